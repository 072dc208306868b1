// float32 values that a thread works in, from a cache line on, kept from one call to the next.
struct Memory {
  float* data = nullptr;
  int64_t size = 0;
  float* reserve(int64_t values) {
    if (values > size) {
      __builtin_free(data);
      size = filled_up(values, 16);
      data = static_cast<float*>(aligned_alloc(64, static_cast<size_t>(size) * sizeof(float)));
    }
    return data;
  }
  ~Memory() { __builtin_free(data); }
};
