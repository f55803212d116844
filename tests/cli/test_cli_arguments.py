"""What the command line and the environment say is taken as it is written, or refused with status 2
and one line that names the option, what was expected and what was given."""

import json
import re

import pytest

SUBCOMMANDS = ("info", "check", "bench", "memory", "route")
# No option takes any of these for a value.
NO_VALUES = (
    *("", " ", "1 ", " 1", "+1", "0x10", "1_000", "1;2", "one", "é", ",", "1,", ",1", "1,,2"),
    *("-1", "1e30", "-1e30", "1e400", "1e-400", "nan", "-nan", "inf", "-inf", "infinity"),
    *("18446744073709551616", "-9223372036854775809", "9" * 400, "1.5.5", "--", "--json", "%s%n"),
)


def options_of(sonicmoe, subcommand):
    """Names of the options that take a value, as --help lists them."""
    text = sonicmoe(subcommand, "--help").stdout
    return re.findall(r"^  (--[a-z-]+) \S", text, flags=re.MULTILINE)


WRONG = [
    (("frob",), "expected one of info, check, bench, memory, route, completion, man; sonicmoe --h"),
    (("",), 'unknown subcommand ""'),
    (("-x",), 'unknown option "-x"'),
    (("--json",), 'unknown option "--json"'),
    (("memory", "--modle", "olmoe"), 'unknown option "--modle"; sonicmoe memory --help'),
    (("info", "check"), 'info: unexpected argument "check"'),
    (("info", ""), 'info: unexpected argument ""'),
    (("check", "--seed", 1, "--seed", 2), '--seed: expected one value, got "1 2"'),
    (("frob",), 'unknown subcommand "frob", expected one of info, check'),
    (("info", "--frob"), "--frob"),
    (("check", "--op", "frob"), "--op: expected one of moe"),
    (("check", "--cases", 0), "--cases"),
    (("check", "--cases", "many"), "--cases"),
    (("check", "--backend", "frob"), "--backend: expected one of"),
    (("check", "--device", "cuda:x"), "--device: expected cpu, cuda or cuda:INDEX"),
    (("check", "--device", "cuda:1023"), "--device"),
    (("check", "--threads", -1), "--threads"),
    (("bench", "--shape", "1,2,3"), "--shape: expected T,d,n,E,K"),
    (("bench", "--shape", "8,8,8,2,3"), "K <= E"),
    (("bench", "--shape", "8,8,8,0,0"), "--shape"),
    (("bench", "--suite", "frob"), "--suite: expected one of"),
    (
        ("bench", "--suite", "cpu", "--shape", "8,8,8,2,1"),
        "either --shape or --suite",
    ),
    (("bench", "--shape", "8,8,8,2,1", "--dtype", "float8"), "--dtype"),
    (("bench", "--shape", "8,8,8,2,1", "--activation", "frob"), "swiglu"),
    (("bench", "--shape", "8,8,8,2,1", "--workspace-limit", 1), "workspace_limit"),
    (("bench", "--repeats", 0), "--repeats"),
    (("memory", "--gpu", "frob"), "--gpu: expected a100, a100-40gb"),
    (("memory", "--layers", 0), "--layers"),
    (("memory", "--other-bytes", "1XB"), "--other-bytes"),
    (("memory", "--other-bytes-per-token", -1), "--other-bytes-per-token"),
    (("memory", "--workspace-limit", "1XB"), "--workspace-limit"),
    (("memory", "--gpus", 8), '--gpus: expected --model FILE beside it, got "8"'),
    (("memory", "--checkpointing"), "--checkpointing: expected --model FILE beside it"),
    (("memory", "--model", "m", "--layers", 2), '--layers: expected no --model beside it, got "2"'),
    (("memory", "--model", "missing.json"), "--model: expected a config.json of transformers"),
    (("route", "--policy", "frob"), "policy: expected one of nearest"),
    (("route", "--scoring", "frob"), "scoring"),
    (("route", "--top-k", 33), "--top-k"),
    (("route", "--tokens", 32), "--tile: expected 1 to the number of tokens"),
    (("route", "--tile", 0), "--tile"),
    (("route", "--logits", "missing.npy"), "missing.npy"),
]


@pytest.mark.parametrize(("arguments", "expected"), WRONG)
def test_a_wrong_argument_gives_one_line_and_status_2(sonicmoe, refused, arguments, expected):
    refused(sonicmoe(*arguments), expected)


@pytest.mark.parametrize("subcommand", ("check", "bench", "memory", "route"))
def test_no_option_takes_what_is_no_value_of_it(sonicmoe, refused, subcommand):
    options = options_of(sonicmoe, subcommand)
    assert len(options) >= 7
    for option in options:
        for value in NO_VALUES:
            if (option, value) == ("--skew", "-1"):
                continue
            refused(sonicmoe(subcommand, option, value), option)
        refused(sonicmoe(subcommand, option), f"{option}: expected a value, got none")
        # As a shell writes an unset variable. The next word is not the value.
        for more in ((), ("7",), ("--json",)):
            assert '""' in refused(sonicmoe(subcommand, f"{option}=", *more), option, "expected")


def test_flags_take_no_value(sonicmoe, refused):
    for subcommand in SUBCOMMANDS:
        for value in ("", "no", "0", "maybe"):
            line = refused(sonicmoe(subcommand, f"--json={value}"), "--json: expected no value")
            assert f'"{value}"' in line


@pytest.mark.parametrize(
    ("option", "highest"),
    [
        ("--seed", 2**64 - 1),
        ("--first", 2**63 - 1),
        ("--threads", 4096),
    ],
)
def test_integers_up_to_the_highest_are_exact(sonicmoe, refused, option, highest):
    arguments = ("check", "--op", "update_expert_bias", "--cases", 1, "--json")
    report = json.loads(sonicmoe(*arguments, option, highest).stdout)
    assert report["operations"][0]["passed"] == 1
    if option == "--seed":
        assert report["seed"] == highest
    refused(sonicmoe(*arguments, option, highest + 1), option, str(highest))


def test_the_last_case_has_a_number(sonicmoe, refused):
    last = 2**63 - 1
    arguments = ("check", "--op", "update_expert_bias", "--json", "--first", last - 1, "--cases")
    report = json.loads(sonicmoe(*arguments, 2).stdout)
    assert report["operations"][0] == {"operation": "update_expert_bias", "passed": 2, "failed": 0}
    refused(sonicmoe(*arguments, 3), "--cases: expected at most 2 with --first", '"3"')


def test_bytes_are_exact(sonicmoe, refused):
    for text, expected in (
        ("9007199254740993", 2**53 + 1),  # a double cannot hold it
        ("9223372036854775807", 2**63 - 1),
        ("8191PiB", None),
        ("8388607TiB", 8388607 * 2**40),
        ("8388608TiB", None),
        ("1.5GiB", 3 * 2**29),
        ("1.5", None),
        ("80GB", 80 * 10**9),
        ("0", 0),
        ("1GiBi", None),
        ("1 GiB", None),
    ):
        result = sonicmoe("memory", "--gpu", text, "--json")
        if expected is None:
            refused(result, "--gpu", f'"{text}"')
        else:
            assert json.loads(result.stdout)["gpu_bytes"] == expected


def test_counts_take_a_suffix(sonicmoe, refused):
    for text, expected in (
        ("32k", 32 * 2**10),
        ("1K", 2**10),
        ("2m", 2**21),
        ("2048M", 2**31),
        ("2097152k", 2**31),
        ("2097153k", None),
        ("2049M", None),
        ("0k", None),
        ("k", None),
        ("1.5k", None),
        ("1kk", None),
        ("-1k", None),
        ("1 k", None),
        ("9007199254740993M", None),
    ):
        result = sonicmoe("memory", "--shape", f"{text},8,8,2,1", "--json")
        if expected is None:
            refused(result, "--shape", f'"{text},8,8,2,1"')
        else:
            assert json.loads(result.stdout)["shape"] == f"{expected},8,8,2,1"
    refused(sonicmoe("bench", "--tokens", "2049M"), "--tokens", "(32k is 32768)")
    route = ("route", "--tokens", "1k", "--experts", 8, "--tile", 64, "--policy", "up", "--json")
    (outcome,) = json.loads(sonicmoe(*route).stdout)["outcomes"]
    assert sum(outcome["rows_per_expert_before"]) == 4 * 1024


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--shape", "2147483648,2147483648,1,1,1"), "--shape"),
        (("--shape", "1,2147483648,2147483648,1,1"), "--shape"),
        (("--shape", "1,1,1,2147483648,2147483648"), None),  # 16 EiB/2^33: fits
        (("--shape", "2147483648,1,2147483648,2,2"), "--shape"),
        (("--shape", "65536,65536,65536,65536,65536", "--layers", 99999), "--layers 99999"),
        (("--shape", "4096,1048576,1048576,64,8", "--layers", 100000), "--layers 100000"),
        (("--shape", "4096,8388608,8388608,64,8", "--parameter-bytes", 1024), "--parameter-bytes"),
        (("--other-bytes", 2**63 - 1), f"--other-bytes {2**63 - 1}"),
        (("--activation", "relu", "--shape", "1,1073741824,1073741824,8,8"), "--shape"),
    ],
)
def test_bytes_beyond_64_bits_are_refused(sonicmoe, refused, options, named):
    result = sonicmoe("memory", *options, "--json")
    if named:
        refused(result, "--shape: expected", named)
        return
    for system in ("sonicmoe", "scattermoe"):
        total = json.loads(result.stdout)[system]["total_bytes_all_layers"]
        assert 2**33 < total < 2**40


def test_memory_is_that_of_python_integers(sonicmoe):
    T, d, n, E, K, layers = 2**20, 2**20, 2**18, 2**10, 2**3, 97
    shape = ",".join(map(str, (T, d, n, E, K)))
    report = json.loads(sonicmoe("memory", "--shape", shape, "--layers", layers, "--json").stdout)
    ours = report["sonicmoe"]
    metadata = 4 * (E + 3 * T * K) + 8 * T * K
    kept = 2 * T * K * 2 * n + metadata
    forward = 2 * T * K * (n + d) + 2 * T * d  # A, Y and the output
    backward = 2 * T * K * max(3 * n, d) + 2 * (2 * T * d)
    peak = max(forward, backward)
    parameters = 4 * E * 3 * n * d
    assert ours["total_bytes_all_layers"] == layers * (parameters + 2 * T * d + kept) + peak > 2**58


def test_sizes_of_bench_are_countable(sonicmoe, refused):
    refused(sonicmoe("bench", "--suite", "paper", "--tokens", 2**31 + 1), "--tokens: expected")
    big = ("--shape", "2147483648,2147483648,2147483648,2147483648,2147483648")
    refused(sonicmoe("bench", *big), "--shape: expected a layer whose bytes stay below 2^62")


def test_logits_larger_than_the_memory_are_refused(sonicmoe, refused):
    for tokens, experts in ((2**31 - 1, 2**31 - 1), (2**31 - 1, 65536)):
        arguments = ("route", "--tokens", tokens, "--experts", experts)
        refused(sonicmoe(*arguments), "--tokens: expected logits and scratch of at most")


# ----------------------------------------------------------------------------------- environment


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("SONICMOE_BACKEND", "abacus"),
        ("SONICMOE_BACKEND", "cpu "),
        ("SONICMOE_BACKEND", "CPU"),
        ("SONICMOE_LOG", "everything"),
        ("SONICMOE_LOG", "1"),
        ("OMP_NUM_THREADS", "5000"),
    ],
)
@pytest.mark.parametrize("subcommand", ("check", "bench", "route"))
def test_the_environment_is_checked_as_options_are(sonicmoe, refused, subcommand, variable, value):
    refused(sonicmoe(subcommand, **{variable: value}), f"{variable}: expected", f'"{value}"')


def test_an_empty_variable_is_none_and_options_overrule_it(sonicmoe):
    arguments = ("check", "--op", "route", "--cases", 1, "--json")
    variables = ("BACKEND", "LOG")
    assert sonicmoe(*arguments, **{f"SONICMOE_{name}": "" for name in variables}).returncode == 0
    overruled = sonicmoe(*arguments, "--backend", "reference", SONICMOE_BACKEND="abacus")
    assert json.loads(overruled.stdout)["backend"] == "reference"


def test_the_environments_backend_is_the_one_that_is_named(sonicmoe):
    bench = ("bench", "--shape", "8,8,8,2,1", "--repeats", 1, "--json")
    report = json.loads(sonicmoe(*bench, SONICMOE_BACKEND="reference").stdout)
    assert report["backend"] == "reference"
    assert "--backend reference" in report["rows"][0]["command"]


def test_an_error_is_one_line_whatever_it_quotes(sonicmoe, refused):
    for value in ("a\nb\nc", "a\rb", "\x1b[31mred", "\t", "x" * 100_000, b"\xff\xfe"):
        line = refused(sonicmoe("check", "--backend", value), "--backend: expected one of")
        assert "\x1b" not in line and len(line) < 1000
        refused(sonicmoe("route", "--logits", value), "--logits")
