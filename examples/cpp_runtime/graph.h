// Tensors, and a graph in a session of ONNX Runtime.
#pragma once

#include <onnxruntime_c_api.h>

#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

using Words = std::vector<std::string>;

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error(what); }

// --- tensors ---------------------------------------------------------------------------------------------------------
struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<int64_t> shape;
  std::vector<char> data;

  float* floats() { return reinterpret_cast<float*>(data.data()); }
  size_t row_bytes() const { return shape.empty() || shape[0] == 0 ? 0 : data.size() / shape[0]; }
};

struct Type {
  ONNXTensorElementDataType number;
  size_t bytes;
};

inline const std::map<std::string, Type> TYPES = {
    {"float32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, 4}},
    {"float64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE, 8}},
    {"float16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, 2}},
    {"int64", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, 8}},
    {"bfloat16", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16, 2}},
    {"int32", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, 4}},
    {"int8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, 1}},
    {"uint8", {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, 1}},
    {"float8_e4m3fn", {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN, 1}},
    {"bool", {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, 1}},
};

inline size_t bytes_of(ONNXTensorElementDataType type) {
  for (const auto& [name, known] : TYPES)
    if (known.number == type) return known.bytes;
  fail("a graph gives tensors of a type that no pack has");
}

inline int64_t count_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

inline Tensor made(const std::string& dtype, std::vector<int64_t> shape) {
  const Type type = TYPES.at(dtype);
  const size_t bytes = count_of(shape) * type.bytes;
  return {type.number, std::move(shape), std::vector<char>(bytes)};
}

inline void set(Tensor& tensor, int64_t at, double value) {
  if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
    tensor.floats()[at] = static_cast<float>(value);
  else if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64)
    reinterpret_cast<int64_t*>(tensor.data.data())[at] = static_cast<int64_t>(value);
  else
    fail("numbers of the program are float32 or int64");
}

// --- ONNX Runtime ----------------------------------------------------------------------------------------------------
inline const OrtApi* ort = nullptr;  // set before the first graph

inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  fail(message);
}

class Graph {
 public:
  Graph(OrtEnv* env, const std::string& path, int threads) {
    OrtSessionOptions* options = nullptr;
    check(ort->CreateSessionOptions(&options));
    check(ort->SetIntraOpNumThreads(options, threads));
    OrtStatus* status = ort->CreateSession(env, path.c_str(), options, &session_);
    ort->ReleaseSessionOptions(options);
    check(status);
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }
  ~Graph() {
    if (memory_) ort->ReleaseMemoryInfo(memory_);
    if (session_) ort->ReleaseSession(session_);
  }
  Graph(const Graph&) = delete;

  std::map<std::string, Tensor> run(std::map<std::string, Tensor>& inputs, const Words& outputs) {
    std::vector<const char*> in_names, out_names;
    std::vector<OrtValue*> in_values, out_values(outputs.size(), nullptr);
    for (auto& [name, tensor] : inputs) {
      OrtValue* value = nullptr;
      check(ort->CreateTensorWithDataAsOrtValue(memory_, tensor.data.data(), tensor.data.size(), tensor.shape.data(),
                                                tensor.shape.size(), tensor.type, &value));
      in_names.push_back(name.c_str());
      in_values.push_back(value);
    }
    for (const auto& name : outputs) out_names.push_back(name.c_str());
    OrtStatus* status = ort->Run(session_, nullptr, in_names.data(), in_values.data(), in_values.size(),
                                 out_names.data(), out_names.size(), out_values.data());
    std::map<std::string, Tensor> found;
    for (size_t i = 0; status == nullptr && i < outputs.size(); ++i) found[outputs[i]] = copied(out_values[i]);
    for (OrtValue* value : in_values) ort->ReleaseValue(value);
    for (OrtValue* value : out_values)
      if (value) ort->ReleaseValue(value);
    check(status);
    return found;
  }

 private:
  static Tensor copied(OrtValue* value) {
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(ort->GetTensorTypeAndShape(value, &info));
    Tensor out;
    size_t rank = 0;
    check(ort->GetTensorElementType(info, &out.type));
    check(ort->GetDimensionsCount(info, &rank));
    out.shape.resize(rank);
    check(ort->GetDimensions(info, out.shape.data(), rank));
    ort->ReleaseTensorTypeAndShapeInfo(info);
    void* data = nullptr;
    check(ort->GetTensorMutableData(value, &data));
    const char* bytes = static_cast<const char*>(data);
    out.data.assign(bytes, bytes + count_of(out.shape) * bytes_of(out.type));
    return out;
  }

  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
};
