// float32 values that a thread works in, kept from one call to the next.
struct Memory {
  float* data = nullptr;
  int64_t size = 0;
  float* reserve(int64_t values) {
    if (values > size) {
      __builtin_free(data);
      data = static_cast<float*>(__builtin_malloc(static_cast<size_t>(values) * sizeof(float)));
      size = values;
    }
    return data;
  }
  ~Memory() { __builtin_free(data); }
};
