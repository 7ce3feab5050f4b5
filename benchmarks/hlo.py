"""What the text of a compiled program says: the compiler's estimates, and what devices exchange."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

_UNKNOWN = 2**63 - 1


def estimated_cycles(text: str) -> int:
    """The sum of the compiler's estimates in a compiled program."""

    return _total(text, _cycles)


def _cycles(line: str) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', line)
    return int(found[1]) if found and int(found[1]) != _UNKNOWN else 0


def corrected_cycles(text: str, bytes_per_cycle: float) -> float:
    """The same, but what multiplies no matrices takes no longer than its operands and results take from memory."""
    computations, _ = _computations(text)
    moved = _moved(text)

    def cycles(line: str) -> float:
        called = re.search(r"calls=%?([\w.\-]+)", line)
        whole = "\n".join([line, *computations[called[1]]]) if called else line
        if " convolution(" in whole or " dot(" in whole:
            return _cycles(line)
        return min(_cycles(line), moved(line) / bytes_per_cycle)

    return _total(text, cycles)


_KINDS = "all-gather|all-reduce|all-to-all|collective-permute|collective-broadcast|reduce-scatter"
_COLLECTIVE = re.compile(rf"= (?P<shapes>.*?) (?P<kind>{_KINDS})(?:-start)?\(")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "f64": 8}


def collectives(text: str) -> list[dict[str, Any]]:
    """What a compiled program exchanges between devices: kind and result shapes of each, as they stand in its text."""
    return [
        {"kind": found["kind"], "shapes": re.findall(r"[a-z]\w*\[[\d,]*\]", found["shapes"])}
        for found in _COLLECTIVE.finditer(text)
    ]


def in_loops(text: str) -> str:
    """Of a compiled program, what runs in every round of a loop: the bodies, and what they call."""
    computations, _ = _computations(text)
    found: set[str] = set()
    names = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    while names:
        name = names.pop()
        if name in computations and name not in found:
            found.add(name)
            names += re.findall(r"%([\w.\-]+)", "\n".join(computations[name]))
    return "\n".join(line for name in found for line in computations[name])


def collective_bytes(text: str) -> int:
    """The bytes of the results of all collectives of one device."""

    def size(line: str) -> int:
        return sum(elements(shape) * _BYTES[shape.split("[")[0]] for c in collectives(line) for shape in c["shapes"])

    return _total(text, size)


_LAUNCHED = {"fusion", "custom-call", "dot", "reduce", "copy", "broadcast", "iota", "scatter", "gather", "sort"}
_LAUNCHED |= {"concatenate", "pad", "transpose", "convert", "dynamic-slice", "dynamic-update-slice"}
_LINE = re.compile(r"%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<kind>[a-z][\w\-]*)\((?P<operands>.*?)\)(?=,|$)")


def kernels(text: str) -> dict[str, int]:
    """How many kernels a program compiled for a GPU launches, and the bytes that they read and write.

    All operands and results count, in a cache or not; but of an array that a kernel reads a slice of, or writes one to,
    only the slice.
    """
    moved = _moved(text)
    return {
        "launches": _total(text, _launched),
        "bytes": _total(text, lambda line: moved(line) if _launched(line) else 0),
    }


def _launched(line: str) -> bool:
    found = _LINE.search(line)
    return found is not None and found["kind"] in _LAUNCHED and "AllocateBuffer" not in line


def _moved(text: str) -> Callable[[str], int]:
    """What finds the bytes that a line of a program reads and writes."""
    computations, _ = _computations(text)
    parsed = {
        name: [found.groupdict() | {"operands": re.findall(r"%([\w.\-]+)", found["operands"])} for found in lines]
        for name, body in computations.items()
        if (lines := [found for line in body if (found := _LINE.search(line))])
    }
    shapes = {line["name"]: line["shape"] for lines in parsed.values() for line in lines}

    def size(shape: str) -> int:
        return sum(elements(x) * _BYTES.get(x.split("[")[0], 0) for x in re.findall(r"[a-z]\w*\[[\d,]*\]", shape))

    def read(name: str, lines: list[dict[str, Any]]) -> int:
        """Of an operand, in a fusion."""
        total = 0
        for line in lines:
            if name in line["operands"]:
                first = line["operands"][0] == name
                if first and line["kind"] == "dynamic-slice":
                    total += size(line["shape"])
                elif line["kind"] == "bitcast":
                    total += read(line["name"], lines)
                elif not first or line["kind"] != "dynamic-update-slice":
                    return size(shapes[name])
        return total

    def written(name: str, lines: dict[str, dict[str, Any]]) -> int:
        line = lines[name]
        if line["kind"] in ("bitcast", "tuple"):
            return sum(written(x, lines) for x in line["operands"])
        return size(shapes[line["operands"][1]] if line["kind"] == "dynamic-update-slice" else line["shape"])

    def moved(line: str) -> int:
        found = _LINE.search(line)
        if found is None:
            return 0
        called = re.search(r"calls=%?([\w.\-]+)", line)
        if not called:
            operands = re.findall(r"%([\w.\-]+)", found["operands"])
            return size(found["shape"]) + sum(size(shapes[x]) for x in operands)
        lines = parsed[called[1]]
        parameters = [line["name"] for line in lines if line["kind"] == "parameter"]
        return sum(read(x, lines) for x in parameters) + written(lines[-1]["name"], {x["name"]: x for x in lines})

    return moved


def elements(shape: str) -> int:
    """How many elements `f32[8,2048]` has."""
    return math.prod(int(n) for n in shape.rstrip("]").split("[")[1].split(",") if n)


def _total(text: str, cost: Callable[[str], Any]) -> Any:
    """The sum of the costs of a program's lines, the body of a loop times the rounds it makes."""
    computations, entry = _computations(text)

    def total(name: str) -> Any:
        costs: Any = 0
        for line in computations[name]:
            costs += cost(line)
            if loop := re.search(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)", line):
                costs += _rounds(line, computations[loop[1]]) * total(loop[2])
            elif call := re.search(r" call\(.*to_apply=%?([\w.\-]+)", line):
                costs += total(call[1])
            elif " conditional(" in line:
                branches = re.findall(r"%([\w.\-]+)", line.split("_computation", 1)[1])
                costs += max(total(branch) for branch in branches if branch in computations)
        return costs

    return total(entry)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation of a program, and the name of the one it begins with."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        if found := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = computations[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _rounds(loop: str, condition: list[str]) -> int:
    """How often a loop runs: what the compiler knows, or else the constant that its counter is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    return max(map(int, re.findall(r"constant\((\d+)\)", "\n".join(condition))), default=1)
