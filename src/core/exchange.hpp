// What all backends share of an exchange: the layout of its buffers, the flags that travel, the
// record of a failure, and the contract of a rank's end. The protocol: docs/design/exchange.md.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "core/objection.hpp"
#include "core/workspace.hpp"
#include "math/host_device.hpp"
#include "sonicmoe/exchange.hpp"

namespace sonicmoe {

inline constexpr int kMostRanks = 32;

// ------------------------------------------------------------------------------------------ flags

/// What a rank does in a call, as its flags say. Two ranks that meet in one call do the same.
enum class ExchangeOperation : std::uint8_t { kForward, kBackward, kBackwardKept };

/// The word that one rank writes into the memory of another. Calls are numbered from 1 modulo 2^32;
/// a call is reached by its own number and by later ones.
struct ExchangeFlag {
  std::uint32_t call = 0;
  ExchangeOperation operation = ExchangeOperation::kForward;
  std::uint32_t num_tokens = 0;  ///< T of the writer, below 2^30
};

/// "moe_exchange_forward" or "moe_exchange_backward".
const char* operation_name(ExchangeOperation operation);

SONICMOE_HD std::uint64_t packed(const ExchangeFlag& flag) {
  return std::uint64_t{flag.call} << 32 |
         std::uint64_t{static_cast<std::uint8_t>(flag.operation)} << 30 | flag.num_tokens;
}
SONICMOE_HD ExchangeFlag unpacked(std::uint64_t word) {
  return {static_cast<std::uint32_t>(word >> 32), static_cast<ExchangeOperation>(word >> 30 & 3),
          static_cast<std::uint32_t>(word) & 0x3fffffffu};
}
SONICMOE_HD bool reached(std::uint32_t seen, std::uint32_t call) {
  return static_cast<std::int32_t>(seen - call) >= 0;
}

/// Where ranks wait for each other.
enum class ExchangeStage : std::uint8_t {
  kPublished,  ///< rows, ids and weights of every rank can be read
  kReady,      ///< partial rows can be read, and this call's rows are read no more
};

// ----------------------------------------------------------------------------------------- layout

/// At the front of every buffer. Flags and digests are written by the rank of their index, the rest
/// by the owner.
struct ExchangeHeader {
  std::uint64_t published[kMostRanks];  ///< ExchangeFlag, packed
  std::uint64_t ready[kMostRanks];      ///< likewise
  std::uint64_t digest[kMostRanks];     ///< call_digest() of what is published
  std::uint32_t call;                   ///< the number of the call that runs, or ran last
  std::uint32_t failed;                 ///< 1: an operation gave up
};

/// A rank's buffer in pieces. Rows of all ranks' tokens lie at their places.
struct ExchangeParts {
  ExchangeHeader* header;
  void* rows_x;       ///< [EP * T_max, d] X: own places by publish, others by pulls
  void* rows_g;       ///< [EP * T_max, d] dO, likewise
  void* partial;      ///< [EP * T_max, d] O_r or its dX: read by the ranks of the tokens
  float* scores;      ///< [EP * T_max, K] dS of the slots with an expert here
  std::int32_t* ids;  ///< [T_max, K] own tokens: -1 for a dropped slot or absent token
  float* weights;     ///< [T_max, K]
};
ExchangeParts carve_exchange(WorkspaceCarver& carver, const ExchangeShape& shape);
ExchangeParts exchange_parts(const ExchangeShape& shape, void* buffer);

/// Where the rows of all ranks' tokens lie: stretches of `chunk` tokens, a stretch of each rank in
/// turn, so that a wave of stretches is one piece. One wave: chunk is T_max.
struct ExchangePlaces {
  std::int64_t num_ranks, chunk;
  SONICMOE_HD std::int64_t of(std::int64_t rank, std::int64_t token) const {
    return (token / chunk * num_ranks + rank) * chunk + token % chunk;
  }
  SONICMOE_HD std::int64_t rank(std::int64_t place) const { return place / chunk % num_ranks; }
  SONICMOE_HD std::int64_t token(std::int64_t place) const {
    return place / (chunk * num_ranks) * chunk + place % chunk;
  }
};
inline ExchangePlaces exchange_places(const ExchangeShape& shape) {
  return {shape.num_ranks, shape.max_tokens};
}

/// Of all that ranks must agree on in a call: equal on all of them.
std::uint64_t call_digest(const ExchangeShape& exchange, const MoEShape& layer,
                          const ExpertOptions& options);

// ---------------------------------------------------------------------------------------- failure

/// Why an operation gave up.
enum class ExchangeFault : std::uint32_t {
  kNone,
  kTimeout,        ///< the peer did not come
  kOrder,          ///< the peer makes another call
  kConfiguration,  ///< the peer's digest differs
};

struct ExchangeFailure {
  ExchangeFault fault = ExchangeFault::kNone;
  std::int32_t rank = 0, peer = 0;
  ExchangeStage stage = ExchangeStage::kPublished;
  std::uint64_t wanted = 0, seen = 0;  ///< flags, packed: the own and the peer's
};

/// "rank 3 waited 600 s for rank 5 to publish call 1214 (forward, 2048 tokens); its last was call
/// 1213 (backward, 2048 tokens)".
std::string describe(const ExchangeFailure& failure, double timeout_seconds);

// ------------------------------------------------------------------------------------------- port

/// What an operation gives to the others. Absent views: not of this call.
struct Publication {
  ExchangeOperation operation = ExchangeOperation::kForward;
  std::uint64_t digest = 0;
  std::int64_t num_tokens = 0;
  ConstTensorView x, grad_out, topk_ids, topk_weights;
};

/// What it gets: ids and weights of all ranks' slots, by places (-1 and 0 where nobody has a
/// token), and the rows with an expert of this rank.
struct Collection {
  std::int32_t* ids = nullptr;  ///< [EP * T_max, K]
  float* weights = nullptr;     ///< [EP * T_max, K]
  void* x = nullptr;            ///< [EP * T_max, d]; null: not of this call
  void* grad_out = nullptr;     ///< likewise
};

/// A rank's end, as a backend moves bytes. An operation is, in this order: publish, meet, collect,
/// the layer on what came, meet, sum. Everything is enqueued; on a CPU it is done on return.
class ExchangePort {
 public:
  virtual ~ExchangePort() = default;

  /// The own buffer in pieces.
  virtual const ExchangeParts& parts() const = 0;
  /// Throws as Exchange::check(), in the operation's name.
  virtual void check(const std::string& operation) const = 0;
  /// Why rows like those of `view` [T, d] cannot be read or written, if so.
  virtual std::optional<Objection> reason_against(const char*, const ConstTensorView&) const {
    return {};
  }

  /// Rows, ids and weights to the own places; a new call begins.
  virtual void publish(const Context& context, const Publication& publication) = 0;
  /// Tells all ranks that this one got here, and waits until all have. The only step that waits.
  virtual void meet(const Context& context, const Publication& publication,
                    ExchangeStage stage) = 0;
  virtual void collect(const Context& context, const Collection& collection) = 0;
  /// out[t] = sum over the ranks with an expert of t, in rank order, of their partial rows, and
  /// unless `scores` is null, scores [T, K] = dS.
  virtual void sum(const Context& context, TensorView out, float* scores) = 0;
};

}  // namespace sonicmoe
