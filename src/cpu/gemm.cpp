#include "cpu/gemm.hpp"

#include <sys/mman.h>

#include <dnnl.hpp>

#if defined(_OPENMP)
#include <omp.h>
#endif

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "sonicmoe/error.hpp"

namespace sonicmoe::cpu {
namespace {

// oneDNN takes all of OpenMP's threads outside a parallel region; inside one it takes one.
class OneThread {
 public:
#if defined(_OPENMP)
  OneThread() : saved_(omp_get_max_threads()) {
    if (saved_ != 1) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (saved_ != 1) omp_set_num_threads(saved_);
  }

 private:
  int saved_;
#endif
};

void scale_or_clear(std::int64_t m, std::int64_t n, float* c, std::int64_t ldc, bool add) {
  if (add) return;
  for (std::int64_t i = 0; i < m; ++i) std::fill_n(c + i * ldc, n, 0.0f);
}

const char* isa_name(dnnl::cpu_isa isa) {
  switch (isa) {
    case dnnl::cpu_isa::sse41:
      return "SSE4.1";
    case dnnl::cpu_isa::avx:
      return "AVX";
    case dnnl::cpu_isa::avx2:
    case dnnl::cpu_isa::avx2_vnni:
      return "AVX2";
    case dnnl::cpu_isa::avx512_core:
    case dnnl::cpu_isa::avx512_core_vnni:
      return "AVX-512";
    case dnnl::cpu_isa::avx512_core_bf16:
      return "AVX-512 with bfloat16";
    case dnnl::cpu_isa::avx512_core_amx:
      return "AMX";
    default:
      return "its best instruction set";
  }
}

const dnnl::engine& engine() {
  // Never destroyed: the primitives of threads that outlive static objects refer to it.
  static const auto& instance = *new dnnl::engine(dnnl::engine::kind::cpu, 0);
  return instance;
}

// oneDNN writes machine code when it first needs a kernel, and ends the process where there is no
// memory for it. So it is asked for first, more than the code takes, and where oneDNN gets it from:
// a heap may hold what the system has no more of.
void require_memory_for_code(std::size_t megabytes) {
  const std::size_t bytes = megabytes << 20;
  void* const room =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  munmap(room, bytes);
}

void sgemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand<float> a, Operand<float> b,
           float* c, std::int64_t ldc, bool add) {
  const dnnl_status_t status =
      dnnl_sgemm(a.row_major ? 'N' : 'T', b.row_major ? 'N' : 'T', m, n, k, 1.0f, a.data, a.ld,
                 b.data, b.ld, add ? 1.0f : 0.0f, c, ldc);
  if (status == dnnl_out_of_memory) throw std::bad_alloc();
  if (status != dnnl_success) {
    throw Error("oneDNN sgemm failed with status " + std::to_string(status) + " at m=" +
                std::to_string(m) + " n=" + std::to_string(n) + " k=" + std::to_string(k));
  }
}

// All the kernels of sgemm, by products small and not so small.
bool make_sgemm_kernels() {
  const OneThread guard;
  require_memory_for_code(32);
  for (const std::int64_t size : {2, 32, 96}) {
    const std::vector<float> ones(static_cast<std::size_t>(size * size), 1.0f);
    std::vector<float> product = ones;
    for (const int variant : {0, 1, 2, 3, 4, 5, 6, 7}) {
      const Operand<float> a{ones.data(), size, (variant & 1) == 0};
      const Operand<float> b{ones.data(), size, (variant & 2) == 0};
      sgemm(size, size, size, a, b, product.data(), size, (variant & 4) != 0);
    }
  }
  return true;
}

// bfloat16 matmul primitives of one thread, created once per shape. Row and column blocks have
// fixed sizes, so that a training run sees few shapes.
class MatmulCache {
 public:
  using Key = std::array<std::int64_t, 8>;

  void run(const Key& key, const bfloat16* a, const bfloat16* b, float* c) {
    const Entry& entry = find(key);
    scratch_.resize(std::max(scratch_.size(), entry.scratch.get_size()));
    const dnnl::engine& eng = engine();
    // oneDNN's handles are not const-correct; sources are only read.
    const dnnl::memory source(entry.source, eng, const_cast<bfloat16*>(a));
    const dnnl::memory weights(entry.weights, eng, const_cast<bfloat16*>(b));
    const dnnl::memory product(entry.product, eng, c);
    const dnnl::memory scratch(entry.scratch, eng, scratch_.data());
    entry.matmul.execute(stream_, {{DNNL_ARG_SRC, source},
                                   {DNNL_ARG_WEIGHTS, weights},
                                   {DNNL_ARG_DST, product},
                                   {DNNL_ARG_SCRATCHPAD, scratch}});
    stream_.wait();
  }

 private:
  struct Entry {
    dnnl::matmul matmul;
    dnnl::memory::desc source, weights, product, scratch;
  };

  static dnnl::memory::desc desc(std::int64_t rows, std::int64_t columns, std::int64_t ld,
                                 bool row_major, dnnl::memory::data_type type) {
    return {
        {rows, columns}, type, row_major ? dnnl::memory::dims{ld, 1} : dnnl::memory::dims{1, ld}};
  }

  static dnnl::matmul::primitive_desc describe(const Entry& entry,
                                               const dnnl::primitive_attr& attributes) {
#if DNNL_VERSION_MAJOR >= 3
    return {engine(), entry.source, entry.weights, entry.product, attributes};
#else
    return {dnnl::matmul::desc(entry.source, entry.weights, entry.product), attributes, engine()};
#endif
  }

  const Entry& find(const Key& key) {
    const auto found = entries_.find(key);
    if (found != entries_.end()) return found->second;
    static std::mutex one_at_a_time;  // so that none takes the memory that another has asked for
    const std::lock_guard lock(one_at_a_time);
    require_memory_for_code(8);
    const auto [m, n, k, lda, ldb, ldc, majors, add] = key;
    using Type = dnnl::memory::data_type;
    Entry entry{{},
                desc(m, k, lda, (majors & 1) != 0, Type::bf16),
                desc(k, n, ldb, (majors & 2) != 0, Type::bf16),
                desc(m, n, ldc, true, Type::f32),
                {}};
    dnnl::primitive_attr attributes;
    attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    if (add != 0) {
      dnnl::post_ops sum;
      sum.append_sum(1.0f);
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::primitive_desc primitive = describe(entry, attributes);
    entry.scratch = primitive.scratchpad_desc();
    entry.matmul = dnnl::matmul(primitive);
    return entries_.emplace(key, std::move(entry)).first->second;
  }

  std::map<Key, Entry> entries_;
  std::vector<std::byte> scratch_;
  dnnl::stream stream_{engine()};
};

}  // namespace

void prepare_gemm() {
  static const bool ready = make_sgemm_kernels();
  (void)ready;
}

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand<float> a, Operand<float> b,
          float* c, std::int64_t ldc, bool add) {
  if (m == 0 || n == 0) return;
  if (k == 0) return scale_or_clear(m, n, c, ldc, add);
  const OneThread guard;
  sgemm(m, n, k, a, b, c, ldc, add);
}

void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand<bfloat16> a, Operand<bfloat16> b,
          float* c, std::int64_t ldc, bool add) {
  if (m == 0 || n == 0) return;
  if (k == 0) return scale_or_clear(m, n, c, ldc, add);
  const OneThread guard;
  thread_local MatmulCache cache;
  const std::int64_t majors = (a.row_major ? 1 : 0) | (b.row_major ? 2 : 0);
  cache.run({m, n, k, a.ld, b.ld, ldc, majors, add ? 1 : 0}, a.data, b.data, c);
}

bool native_bfloat16() {
  static const bool native = [] {
    const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa();
    return isa == dnnl::cpu_isa::avx512_core_bf16 || isa == dnnl::cpu_isa::avx512_core_amx;
  }();
  return native;
}

std::string gemm_description() {
  const dnnl_version_t* v = dnnl_version();
  return "oneDNN " + std::to_string(v->major) + "." + std::to_string(v->minor) + "." +
         std::to_string(v->patch) + ", " + isa_name(dnnl::get_effective_cpu_isa());
}

}  // namespace sonicmoe::cpu
