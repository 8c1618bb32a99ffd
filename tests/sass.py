"""What machine code of kernels (compute capability 9.0) does before it waits for the kernel in
front of it, and whether it has what it loaded from shared memory before it gives that away.
"""

import itertools
import re

# Of memory that an earlier kernel may still be writing or reading.
GLOBAL_ACCESS = re.compile(
    r"(?<![\w.])(LDG|LD\.|LDGSTS|UBLKCP|UTMALDG|ATOM|RED|STG|ST\.|UTMASTG|UTMAREDG)"
)
WAIT = "ACQBULK"  # griddepcontrol.wait
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
_CODE = re.compile(r"/\* 0x([0-9a-f]{16}) \*/")
_SHARED_LOAD = re.compile(r"(?<![\w.])LDSM?\b")
_ARRIVAL = "SYNCS.ARRIVE"  # mbarrier.arrive
_JUMPS = re.compile(r"(BRA [`0]|EXIT|RET)")  # never goes on behind
_NO_SCOREBOARD = 7
_ENDS = re.compile(r"(BRA|JMP|EXIT|RET|BRX)\b")
_BRANCHES = re.compile(r"(BRA|JMP|CALL)\b")
_TARGET = re.compile(r"0x[0-9a-f]+")


def functions(listing: str) -> dict[str, dict[int, str]]:
    """{name: {address: instruction}} of what `cuobjdump -sass` printed."""
    found: dict[str, dict[int, str]] = {}
    instructions: dict[int, str] = {}
    for line in listing.splitlines():
        if name := _FUNCTION.match(line):
            instructions = found.setdefault(name[1], {})
        elif instruction := _INSTRUCTION.match(line):
            instructions[int(instruction[1], 16)] = instruction[2].strip()
    return found


def accesses_before_wait(instructions: dict[int, str]) -> list[str]:
    """Accesses to global memory that can be reached from the start without passing a wait; of a
    function without a wait, none.
    """
    if not any(WAIT in text for text in instructions.values()):
        return []
    addresses = sorted(instructions)
    following = dict(itertools.pairwise(addresses))
    seen: set[int] = set()
    pending, hits = [addresses[0]], []
    while pending:
        at = pending.pop()
        if at in seen:
            continue
        seen.add(at)
        text = instructions[at]
        predicated = text.startswith("@")
        operation = re.sub(r"^@!?U?P\w+\s+", "", text)
        if WAIT in text and not predicated:
            continue
        if GLOBAL_ACCESS.search(text):
            hits.append(f"{at:#x}: {text}")
        target = _TARGET.search(operation.split("`")[-1])
        if _BRANCHES.match(operation) and target and int(target[0], 16) in instructions:
            pending.append(int(target[0], 16))
        # `BRA P0, target` and `BRA.DIV` go on behind when they do not branch.
        conditional = predicated or "," in operation or ".DIV" in operation or ".U.ANY" in operation
        if at in following and (conditional or not _ENDS.match(operation)):
            pending.append(following[at])
    return hits


def loads_under_way(listing: str) -> dict[str, list[str]]:
    """{name: arrivals at mbarriers in front of which loads from shared memory were not waited for},
    of what `cuobjdump -sass` printed. In the order of the listing: a wait counts where a branch
    passes over it, too, and nothing is under way behind a jump. Along all branches there would be
    ways among them that no condition takes.

    An instruction's upper 64 bits have, from bit 46 on, the scoreboard that it sets until its
    result is there (3 bits, 7 for none), and from bit 52 on those that it waits for (6 bits).
    """
    found: dict[str, list[str]] = {}
    under_way: dict[int, list[str]] = {}
    lines = listing.splitlines()
    name = ""
    for line, upper in itertools.pairwise(lines):
        if function := _FUNCTION.match(line):
            name, under_way = function[1], {}
            found[name] = []
        instruction, code = _INSTRUCTION.match(line), _CODE.search(upper)
        if instruction is None or code is None:
            continue
        address, text = instruction[1], instruction[2].strip()
        bits = int(code[1], 16)
        awaited = bits >> 52 & 0x3F
        under_way = {b: loads for b, loads in under_way.items() if not awaited >> b & 1}
        if _ARRIVAL in text:
            found[name] += [
                f"0x{address}: {text} behind {load}"
                for load in itertools.chain(*under_way.values())
            ]
        scoreboard = bits >> 46 & 7
        if _SHARED_LOAD.search(text) and scoreboard != _NO_SCOREBOARD:
            under_way.setdefault(scoreboard, []).append(text)
        if _JUMPS.match(text):
            under_way = {}
    return found
