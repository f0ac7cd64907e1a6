"""A small pack with every kind of row that a flat program has, and an interpreter of such programs in numpy."""

from functools import cache

import numpy as np
import onnxruntime

import vivace
from vivace.engine.noise import normals
from vivace.engine.passes import apply_block_cache, apply_guidance
from vivace.export import export_onnx


def cached_plan(pipe):
    """Rows that keep, forecast from two planes or give again, guided in some rows only."""
    plan = vivace.make_plan(pipe.spec.schedule, "dpmpp_2m", 8, prediction=pipe.spec.prediction)
    plan = apply_guidance(plan, 2.0, interval=(0.2, 0.7))
    return apply_block_cache(plan, "taylorseer", interval=2, order=1, first=1)


def cached_pack(folder):
    """The pack of that plan and the bundled model."""
    pipe = vivace.load("emoji")
    return export_onnx(pipe, cached_plan(pipe), folder / "pack")


@cache
def session_of(path):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options)


class Reader:
    """The interpreter: one method for inputs, one for outputs. find: the path of a graph by its name in the program."""

    def __init__(self, find, n, label, seed):
        self.find, self.n, self.label, self.seed = find, n, label, seed
        self.buffers, self.graphs, self.given, self.result = {}, {}, {}, ""

    def run(self, text):
        calls = []
        for words in (line.split(" ") for line in text.splitlines()[1:]):
            match words:
                case ["latent", *sizes]:
                    self.latent = tuple(map(int, sizes))
                case ["graph", number, file]:
                    self.graphs[number] = session_of(self.find(file))
                case ["given", key, branch, value]:
                    self.given[key, branch] = int(value)
                case ["call", graph, rows]:
                    calls.append((graph, self.n if rows == "pictures" else 1, [], []))
                case ["in", *rest]:
                    calls[-1][2].append(rest)
                case ["out", *rest]:
                    calls[-1][3].append(rest)
                case ["result", slot]:
                    self.result = slot
        for graph, n, ins, outs in calls:
            inputs = {port: self.read(n, dtype, *rest) for port, dtype, *rest in ins}
            found = self.graphs[graph].run([port for port, *_ in outs], inputs)
            for (_, *rest), value in zip(outs, found, strict=True):
                self.keep(n, value, *rest)
        return self.buffers[self.result].reshape(self.n, *self.latent)

    def slot(self, name):
        if name == "one":
            return np.ones((self.n, int(np.prod(self.latent))), np.float32)
        if name.startswith("noise:"):
            drawn = [normals(self.latent, self.seed, picture=j, draw=int(name[6:])) for j in range(self.n)]
            return np.stack(drawn).reshape(self.n, -1)
        return self.buffers[name]

    def read(self, n, dtype, mode, *rest):
        match mode:
            case "tile":
                return np.concatenate([self.slot(rest[1])] * int(rest[0])).reshape(-1, *self.latent)
            case "stack":
                return np.stack([self.slot(name) for name in rest], 1)
            case "fill":
                return np.full(int(rest[0]) * n, float(rest[1]), dtype)
            case "numbers":
                rank = 1 + int(rest[0])
                return np.array(list(map(float, rest[rank:]))).reshape(tuple(map(int, rest[1:rank]))).astype(dtype)
            case "condition":
                return np.repeat([self.given.get((rest[0], branch), self.label) for branch in rest[1:]], n)
            case "rows":
                return np.repeat(self.buffers[rest[0]][list(map(int, rest[1:]))], n, 0)
            case "kept":
                held = self.buffers[rest[0]]
                return np.concatenate([held.reshape(-1, n, *held.shape[1:])[int(i)] for i in rest[1:]])
        return self.buffers[rest[0]]

    def keep(self, n, value, mode, *rest):
        match mode:
            case "branches":
                self.buffers |= zip(rest, value.reshape(len(rest), n, -1), strict=True)
            case "columns":
                self.buffers |= zip(rest, value.transpose(1, 0, 2), strict=True)
            case "kept":
                held = self.buffers.setdefault(rest[0], np.zeros((int(rest[1]) * n, *value.shape[1:]), value.dtype))
                for i, part in zip(rest[2:], value.reshape(-1, n, *value.shape[1:]), strict=True):
                    held.reshape(-1, n, *value.shape[1:])[int(i)] = part
            case _:
                self.buffers[rest[0]] = value
