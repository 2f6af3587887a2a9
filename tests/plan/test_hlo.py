"""Programs written by hand: what is called, how large it is, how often a loop runs."""

import pytest

from diffusion_jax.plan.hlo import (
    branches,
    bytes_of,
    called,
    parse,
    shape_of,
    trip_count,
)

PROGRAM = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], f32[4])) -> (s32[], f32[4]) {
  %p = (s32[], f32[4]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[4]{0} get-tuple-element(%p), index=1
  %two = s32[] constant(STEP)
  %next = s32[] ADD(%i, %two)
  %y = f32[4]{0} add(%x, %x)
  ROOT %out = (s32[], f32[4]{0}) tuple(%next, %y)
}

%condition (q: (s32[], f32[4])) -> pred[] {
  %q = (s32[], f32[4]{0}) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] compare(%j, %limit), direction=DIRECTION
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %start = s32[] constant(START)
  %t = (s32[], f32[4]{0}) tuple(%start, %a)
  %loop = (s32[], f32[4]{0}) while(%t), condition=%condition, body=%bodyNOTE
  ROOT %r = f32[4]{0} get-tuple-element(%loop), index=1
}
"""


def loop(start=0, step=1, limit=10, direction="LT", add="add", note=""):
    words = dict(STEP=step, LIMIT=limit, DIRECTION=direction, START=start, ADD=add, NOTE=note)
    text = PROGRAM
    for word, value in words.items():
        text = text.replace(word, str(value))
    program = parse(text)
    main = program.computations[program.entry]
    return trip_count(program, main, main["loop"])


@pytest.mark.parametrize(
    ("options", "turns"),
    [
        ({}, len(range(0, 10))),
        ({"start": 3}, len(range(3, 10))),
        ({"step": 3}, len(range(0, 10, 3))),
        ({"direction": "LE"}, len(range(0, 11))),
        ({"start": 9, "add": "subtract", "limit": 0, "direction": "GT"}, len(range(9, 0, -1))),
        ({"start": 9, "add": "subtract", "limit": 0, "direction": "GE"}, len(range(9, -1, -1))),
        ({"start": 10}, 0),
        ({"direction": "NE", "step": 2}, len(range(0, 10, 2))),
        ({"add": "multiply"}, None),
        ({"note": ', backend_config={"known_trip_count":{"n":"77"}}'}, 77),
    ],
)
def test_loops_run_as_often_as_pythons_ranges(options, turns):
    assert loop(**options) == turns


def test_operations_and_their_parts():
    program = parse(PROGRAM.replace("NOTE", ""))
    assert program.entry == "main" and set(program.computations) == {"body", "condition", "main"}
    op = program.computations["main"]["loop"]
    assert (op.opcode, op.operands, op.is_root) == ("while", ("t",), False)
    assert op.result == "(s32[], f32[4]{0})"
    assert called(op, "body") == "body" and called(op, "calls") is None
    assert program.computations["main"]["r"].is_root


def test_both_spellings_of_branches():
    text = (
        "ENTRY %main (a: s32[]) -> f32[2] {\n"
        "  %a = s32[] parameter(0)\n"
        "  %c = f32[2]{0} conditional(%a), branch_computations={%one, %two}\n"
        "  ROOT %d = f32[2]{0} conditional(%a), true_computation=%yes, false_computation=%no\n"
        "}\n"
    )
    main = parse(text).computations["main"]
    assert branches(main["c"]) == ["one", "two"] and branches(main["d"]) == ["yes", "no"]


def test_attributes_that_run_over_lines_stay_with_their_operation():
    text = (
        "ENTRY %main (a: f32[2]) -> f32[2] {\n"
        "  %a = f32[2]{0} parameter(0)\n"
        '  ROOT %k = f32[2]{0} custom-call(%a), custom_call_target="first\n'
        'second", calls=%kernel\n'
        "}\n"
    )
    assert called(parse(text).computations["main"]["k"], "calls") == "kernel"


def test_shapes_and_bytes():
    assert shape_of("bf16[2,3]{1,0}") == (2, 3) and shape_of("s32[]") == ()
    assert bytes_of(["f32[2,3]{1,0}"]) == 24
    assert bytes_of(["(bf16[10]{0}, pred[5]{0}, s32[])", "f64[2]"]) == 20 + 5 + 4 + 16
    assert bytes_of(["s4[5]"]) == 3  # two in a byte
    assert bytes_of(["token[]"]) == 0


def test_a_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        parse("HloModule empty\n")
