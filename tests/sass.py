"""What machine code of kernels does before it waits for the kernel in front of it."""

import itertools
import re

# Of memory that an earlier kernel may still be writing or reading.
GLOBAL_ACCESS = re.compile(
    r"(?<![\w.])(LDG|LD\.|LDGSTS|UBLKCP|UTMALDG|ATOM|RED|STG|ST\.|UTMASTG|UTMAREDG)"
)
WAIT = "ACQBULK"  # griddepcontrol.wait
_FUNCTION = re.compile(r"\s*Function : (\S+)")
_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")
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
