// Runs the flat program of a pack on the ONNX Runtime C API: no Python, no other library.
//
//   run_pack PACK [--label 12] [--n 2] [--seed 0] [--threads 1] [--out picture] [--latents FILE]
//
// The program (program.txt of the pack) lists every graph call of the plan with where inputs come from and where
// outputs go; this file is its interpreter. The language is described in vivace/export/flat_program.py.
#include <chrono>
#include <cstring>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "graph.h"
#include "noise.h"

// --- the program -----------------------------------------------------------------------------------------------------
struct Call {
  int graph;
  bool pictures;
  std::vector<Words> in, out;  // {port, dtype, mode, ...} and {port, mode, ...}
};

struct Program {
  std::vector<int64_t> latent;
  std::vector<std::string> graphs;
  std::map<std::pair<std::string, std::string>, int64_t> given;
  std::vector<Call> calls;
  std::string result, picture;
};

Program read_program(const std::string& path) {
  std::ifstream file(path);
  if (!file) fail(path + ": cannot be read; packs of plans that it cannot say have none");
  Program program;
  std::string line;
  for (bool first = true; std::getline(file, line); first = false) {
    std::istringstream stream(line);
    Words words{std::istream_iterator<std::string>(stream), {}};
    if (first && (words.size() != 2 || words[0] != "vivace-program" || words[1] != "1"))
      fail(path + ": not a program of version 1");
    if (words.empty() || first) continue;
    const std::string& kind = words[0];
    const Words rest(words.begin() + 1, words.end());
    if (kind == "latent")
      for (const auto& word : rest) program.latent.push_back(std::stoll(word));
    else if (kind == "graph")
      program.graphs.push_back(rest.at(1));
    else if (kind == "given")
      program.given[{rest.at(0), rest.at(1)}] = std::stoll(rest.at(2));
    else if (kind == "call")
      program.calls.push_back({std::stoi(rest.at(0)), rest.at(1) == "pictures", {}, {}});
    else if (kind == "in")
      program.calls.back().in.push_back(rest);
    else if (kind == "out")
      program.calls.back().out.push_back(rest);
    else if (kind == "result")
      program.result = rest.at(0);
    else if (kind == "picture")
      program.picture = rest.at(0);
    else
      fail(path + ": a line begins with " + kind + ", which this program does not know");
  }
  return program;
}

struct Request {
  int64_t n = 1, label = 0;
  uint64_t seed = 0;
};

class Machine {
 public:
  Machine(const Program& program, const Request& request) : program_(program), request_(request) {
    elements_ = count_of(program.latent);
  }

  void run(const Call& call, Graph& graph) {
    n_ = call.pictures ? request_.n : 1;
    std::map<std::string, Tensor> inputs;
    Words outputs;
    for (const auto& words : call.in) inputs[words.at(0)] = input(words);
    for (const auto& words : call.out) outputs.push_back(words.at(0));
    auto found = graph.run(inputs, outputs);
    for (const auto& words : call.out) keep(words, found.at(words[0]));
  }

  Tensor& buffer(const std::string& name) {
    const auto at = buffers_.find(name);
    if (at == buffers_.end()) fail("buffer " + name + " is read before it is written");
    return at->second;
  }

 private:
  Tensor input(const Words& words) {
    const std::string &dtype = words.at(1), &mode = words.at(2);
    const Words rest(words.begin() + 3, words.end());
    if (mode == "tile") {
      std::vector<int64_t> shape = program_.latent;
      shape.insert(shape.begin(), 0);
      Tensor out = made(dtype, shape);
      for (int k = std::stoi(rest.at(0)); k > 0; --k) append(out, slot(rest.at(1)), 0, n_);
      return out;
    }
    if (mode == "stack") return stacked(rest);
    if (mode == "fill") {
      Tensor out = made(dtype, {std::stoll(rest.at(0)) * n_});
      for (int64_t i = 0; i < out.shape[0]; ++i) set(out, i, std::stod(rest.at(1)));
      return out;
    }
    if (mode == "numbers") {
      const size_t rank = std::stoul(rest.at(0));
      std::vector<int64_t> shape;
      for (size_t i = 0; i < rank; ++i) shape.push_back(std::stoll(rest.at(1 + i)));
      Tensor out = made(dtype, shape);
      for (int64_t i = 0; i < count_of(shape); ++i) set(out, i, std::stod(rest.at(1 + rank + i)));
      return out;
    }
    if (mode == "condition") {
      if (rest.at(0) != "label") fail("this example knows prompts that are classes, not the tensor " + rest[0]);
      Tensor out = made(dtype, {static_cast<int64_t>(rest.size() - 1) * n_});
      for (int64_t i = 0; i < out.shape[0]; ++i) {
        const auto at = program_.given.find({rest[0], rest[1 + i / n_]});
        set(out, i, static_cast<double>(at == program_.given.end() ? request_.label : at->second));
      }
      return out;
    }
    if (mode == "whole") return buffer(rest.at(0));
    const Tensor& from = buffer(rest.at(0));
    Tensor out{from.type, from.shape, {}};
    out.shape.at(0) = 0;
    for (size_t i = 1; i < rest.size(); ++i) {
      const int64_t number = std::stoll(rest[i]);
      if (mode == "kept")
        append(out, from, number * n_, n_);
      else if (mode == "rows")
        for (int64_t j = 0; j < n_; ++j) append(out, from, number, 1);
      else
        fail("an input has the mode " + mode + ", which this program does not know");
    }
    return out;
  }

  void keep(const Words& words, Tensor& value) {
    const std::string& mode = words.at(1);
    const Words rest(words.begin() + 2, words.end());
    if (mode == "whole") {
      buffers_[rest.at(0)] = std::move(value);
    } else if (mode == "branches") {
      for (size_t b = 0; b < rest.size(); ++b) {
        Tensor out = made("float32", {0, elements_});
        append(out, value, b * n_, n_);
        buffers_[rest[b]] = std::move(out);
      }
    } else if (mode == "columns") {
      for (size_t o = 0; o < rest.size(); ++o) {
        Tensor out = made("float32", {n_, elements_});
        for (int64_t j = 0; j < n_; ++j)
          std::memcpy(out.floats() + j * elements_, value.floats() + (j * rest.size() + o) * elements_, elements_ * 4);
        buffers_[rest[o]] = std::move(out);
      }
    } else if (mode == "kept") {
      Tensor& plane = buffers_[rest.at(0)];
      if (plane.data.empty()) {
        plane = {value.type, value.shape, {}};
        plane.shape.at(0) = std::stoll(rest.at(1)) * n_;
        plane.data.resize(count_of(plane.shape) * bytes_of(plane.type));
      }
      const size_t part = value.row_bytes() * n_;
      for (size_t b = 2; b < rest.size(); ++b)
        std::memcpy(plane.data.data() + std::stoull(rest[b]) * part, value.data.data() + (b - 2) * part, part);
    } else {
      fail("an output has the mode " + mode + ", which this program does not know");
    }
  }

  // Slots side by side, [n, slots, elements].
  Tensor stacked(const Words& names) {
    const int64_t count = names.size();
    Tensor out = made("float32", {n_, count, elements_});
    for (int64_t k = 0; k < count; ++k) {
      Tensor& from = slot(names[k]);
      for (int64_t j = 0; j < n_; ++j)
        std::memcpy(out.floats() + (j * count + k) * elements_, from.floats() + j * elements_, elements_ * 4);
    }
    return out;
  }

  Tensor& slot(const std::string& name) {
    const bool drawn = name.rfind("noise:", 0) == 0;
    if ((drawn || name == "one") && buffers_.count(name) == 0) {
      Tensor all = made("float32", {n_, elements_});
      for (int64_t j = 0; j < n_; ++j) {
        std::vector<float> values(elements_, 1.0f);
        if (drawn) values = noise::normals(elements_, request_.seed, j, std::stoul(name.substr(6)));
        std::memcpy(all.floats() + j * elements_, values.data(), elements_ * 4);
      }
      buffers_[name] = std::move(all);
    }
    return buffer(name);
  }

  static void append(Tensor& out, const Tensor& from, int64_t first, int64_t rows) {
    if (first < 0 || first + rows > from.shape.at(0)) fail("the program reads rows that a buffer has not");
    const char* begin = from.data.data() + first * from.row_bytes();
    out.data.insert(out.data.end(), begin, begin + rows * from.row_bytes());
    out.shape.at(0) += rows;
  }

  const Program& program_;
  const Request request_;
  int64_t elements_ = 0, n_ = 1;
  std::map<std::string, Tensor> buffers_;
};

// --- files -----------------------------------------------------------------------------------------------------------
void write_pictures(const Tensor& pictures, const std::string& prefix) {
  const int64_t height = pictures.shape.at(1), width = pictures.shape.at(2), channels = pictures.shape.at(3);
  if (channels != 1 && channels != 3) fail("pictures have 1 or 3 channels");
  for (int64_t j = 0; j < pictures.shape[0]; ++j) {
    const std::string name = prefix + "-" + std::to_string(j) + (channels == 3 ? ".ppm" : ".pgm");
    std::ofstream file(name, std::ios::binary);
    file << (channels == 3 ? "P6" : "P5") << "\n" << width << " " << height << "\n255\n";
    file.write(pictures.data.data() + j * pictures.row_bytes(), pictures.row_bytes());
    if (!file.flush()) fail(name + ": cannot be written");
    std::cout << name << "\n";
  }
}

int run(int argc, char** argv) {
  std::map<std::string, std::string> options = {{"--n", "1"},       {"--label", "0"}, {"--seed", "0"},
                                                {"--threads", "1"}, {"--out", ""},    {"--latents", ""}};
  if (argc < 2 || argc % 2) fail("usage: run_pack PACK [--label 12] [--n 2] [--seed 0] [--threads 1] [--out picture]");
  for (int i = 2; i + 1 < argc; i += 2) {
    if (options.count(argv[i]) == 0) fail(std::string("unknown option ") + argv[i]);
    options[argv[i]] = argv[i + 1];
  }
  const std::string pack = argv[1];
  const Program program = read_program(pack + "/program.txt");
  const Request request{std::stoll(options["--n"]), std::stoll(options["--label"]), std::stoull(options["--seed"])};
  if (request.n < 1) fail("--n: a number of pictures from 1 is needed");

  ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);
  if (ort == nullptr) fail("this ONNX Runtime is older than the headers that the program was compiled with");
  OrtEnv* env = nullptr;
  check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "run_pack", &env));
  {
    std::vector<std::unique_ptr<Graph>> graphs;
    for (const auto& file : program.graphs)
      graphs.push_back(std::make_unique<Graph>(env, pack + "/" + file, std::stoi(options["--threads"])));
    Machine machine(program, request);
    const auto began = std::chrono::steady_clock::now();
    for (const Call& call : program.calls) machine.run(call, *graphs.at(call.graph));
    const std::chrono::duration<double, std::milli> taken = std::chrono::steady_clock::now() - began;
    std::cout << program.calls.size() << " calls in " << taken.count() << " ms\n";
    if (!options["--latents"].empty()) {
      const Tensor& x = machine.buffer(program.result);
      std::ofstream(options["--latents"], std::ios::binary).write(x.data.data(), x.data.size());
    }
    if (!options["--out"].empty() && !program.picture.empty())
      write_pictures(machine.buffer(program.picture), options["--out"]);
  }
  ort->ReleaseEnv(env);
  return 0;
}

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "run_pack: " << error.what() << "\n";
    return 1;
  }
}
