"""The tools that hold kernels to their rules: the dialect, and the budgets of the compile check."""

import ast
from pathlib import Path

import numpy as np
import pytest

from tools.compile_kernels import (
    Budget,
    Kernel,
    Report,
    check,
    function_name,
    parse_budgets,
    parse_ptxas,
    stale_operands,
)
from tools.lint_kernels import ROOT, lint

HERE = Path(__file__).parent
BREACHES = {
    "triple chevrons": "kernel<<<1, 2>>>();",
    "static shared memory": "__shared__ float x[4];",
    "architecture": "#if __CUDA_ARCH__ >= 900",
    "inline asm": 'asm volatile("nop;");',
    "conditional compilation": "#ifdef FAST\n#endif",
    "spin loop": "while (ptx::load_acquire(flag) == 0) {}",
    "quoted shared header": '#include "ptx.h"',
    "torch header": "#include <torch/all.h>",
    "allocation": "cudaMalloc(&p, 4);",
    "read-only load of activations": "const uint4 v = ptx::load_16_read_only(x + row);",
    "device printf": 'printf("%d", 1);',
}
LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN10tokenspeed12_GLOBAL__N_18rms_normI6__halfEEvPKT_' for 'sm_90a'
ptxas info    : Function properties for _ZN10tokenspeed12_GLOBAL__N_18rms_normI6__halfEEvPKT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes stack frame, 2048 bytes smem
"""


@pytest.mark.parametrize("breach", BREACHES)
def test_the_lint_names_each_breach_of_the_dialect(breach):
    path = ROOT / "build" / "lint.cu"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"// comments may say __shared__ and <<<\nint x;\n{BREACHES[breach]}\n")
    faults = lint(path)
    assert faults and all("lint.cu:3:" in fault for fault in faults)


def test_the_kernels_keep_the_dialect():
    files = [*(ROOT / "csrc" / "kernels").rglob("*.cu"), *(HERE / "cuda").rglob("*.cu")]
    assert len(files) > 5
    assert [fault for path in files for fault in lint(path)] == []


@pytest.mark.parametrize(
    ("symbol", "name"),
    [
        ("_ZN10tokenspeed8rms_normI6__halfEEvPKT_", "rms_norm"),
        (
            "_ZN10tokenspeed59_GLOBAL__N__d966b9e0_26_gated_delta_rule_decode_cu_c836b89313decode_kernelILi1EEEv",
            "decode_kernel",
        ),
        ("_ZN10tokenspeedL6kernelEPf", "kernel"),
        ("_Z1kPf", "k"),
        ("plain", "plain"),
    ],
)
def test_function_names_come_out_of_mangled_symbols(symbol, name):
    assert function_name(symbol) == name


def test_ptxas_output_is_read():
    (kernel,) = parse_ptxas(LOG)
    assert (kernel.name, kernel.registers, kernel.shared, kernel.stack) == ("rms_norm", 40, 2048, 16)
    assert (kernel.spill_stores, kernel.spill_loads) == (8, 4)


def test_budgets_are_read_and_refused():
    source = "// budget: a registers<=64 shared<=2K hot sass=HGMMA\n// budget: b registers<=32\n"
    assert parse_budgets(source) == {"a": Budget(64, 2048, True, "HGMMA"), "b": Budget(32, 0, False, None)}
    with pytest.raises(ValueError, match="'warm' is none of"):
        parse_budgets("// budget: a registers<=64 warm")
    with pytest.raises(ValueError, match="registers<=N is missing"):
        parse_budgets("// budget: a hot")


def report(**changes) -> Report:
    kernel = Kernel("rms_norm", "_Z8rms_normv", registers=40, shared=2048)
    for name, value in changes.items():
        setattr(kernel, name, value)
    return Report("rms_norm.cu", "", kernels=[kernel])


WITHIN = {"rms_norm": Budget(40, 2048, True, None)}


def test_a_kernel_within_its_budget_passes():
    assert check(report(), WITHIN, None) == []


@pytest.mark.parametrize(
    ("made", "budgets", "fault"),
    [
        (report(registers=41), WITHIN, "uses 41 registers, budget 40"),
        (report(shared=2049), WITHIN, "uses 2049 bytes of shared memory"),
        (report(spill_loads=4), WITHIN, "is hot but spills"),
        (report(stack=8), WITHIN, "8 bytes of stack"),
        (report(), {}, "declares no budget"),
        (report(), {**WITHIN, "gone": Budget(1, 1, False, None)}, "budget of gone, which is no kernel"),
        (Report("rms_norm.cu", "", failed=True), {}, "does not compile"),
        (Report("rms_norm.cu", "", warnings=["ptxas info : (C7510) wgmma serialized"]), {}, "C7510"),
    ],
)
def test_each_fault_of_a_kernel_is_named(made, budgets, fault):
    assert fault in "\n".join(check(made, budgets, None))


def test_a_missing_instruction_is_named():
    budgets = {"rms_norm": Budget(40, 2048, True, "HMMA")}
    sass = "Function : other\n HMMA.16816 ;\nFunction : _Z8rms_normv\n FADD ;\n"
    assert "holds no HMMA" in check(report(), budgets, sass)[0]
    assert check(report(), budgets, sass.replace("FADD", "HMMA.16816")) == []


def test_an_instruction_that_lost_a_register_is_named():
    right = "Function : _Z8rms_normv\n HMMA.16816 ;\n LDGSTS.E.BYPASS.128 [R5+0x600], desc[UR8][R12.64], P1 ;\n"
    budgets = {"rms_norm": Budget(40, 2048, True, "HMMA")}
    assert check(report(), budgets, right) == []
    for wrong in ("[R5+UR0], desc[UR1]", "[R15+UR0+0x600], desc[UR1]"):
        (fault,) = check(report(), budgets, right.replace("[R5+0x600], desc[UR8]", wrong))
        assert "ptx::opaque" in fault


# What ptxas 13.0 made of `if (chunks > 0) prefetch(box)`: UR8, a coordinate, is set if P1 holds.
PREFETCH = """
        /*0010*/                   ISETP.GT.AND P1, PT, R32, R47, PT ;
        /*0020*/                   UISETP.GE.AND UP1, UPT, UR4, 0x1, UPT ;
MOVE_BEFORE
        /*0040*/                   PLOP3.LUT P1, PT, PT, PT, UP1, 0x80, 0x0 ;
        /*0050*/                   VOTEU.ANY UP0, P1 ;
MOVE_AFTER
        /*0070*/                   PLOP3.LUT P0, PT, P0, P1, PT, 0xa2, 0x0 ;
        /*0080*/              @P1  R2UR P0, UR9, R6 ;
        /*0090*/              @P1  PLOP3.LUT P1, PT, P0, PT, PT, 0x80, 0x0 ;
        /*00a0*/                   PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0 ;
        /*00b0*/              @UP0 UTMAPF.L2.2D [UR8], [UR4] ;
        /*00c0*/              @P1  BRA.U.ANY 0x70 ;
"""
MOVE = "        /*0030*/              @P1  R2UR UR8, R42 ;"


def test_an_operand_that_a_stale_predicate_sets_is_named():
    wrong = PREFETCH.replace("MOVE_BEFORE", MOVE).replace("MOVE_AFTER", "")
    right = PREFETCH.replace("MOVE_BEFORE", "").replace("MOVE_AFTER", MOVE)
    assert stale_operands(wrong) == ["UTMAPF.L2.2D [UR8], [UR4]: @P1 R2UR UR8, R42"]
    assert stale_operands(right) == []
    assert stale_operands(wrong.replace("@P1  R2UR UR8", "R2UR UR8")) == []
    [fault] = check(report(), WITHIN, f"Function : _Z8rms_normv\n{wrong}")
    assert "rms_norm: operand set under another predicate: UTMAPF" in fault


def test_a_card_has_computed_every_wrapper_test():
    """tests/kernels/golden.npz holds a call of each test that runs on a card; --record-golden writes it there."""
    path = HERE / "golden.npz"
    if not path.exists():
        pytest.skip(
            "no card has recorded golden.npz yet: pytest --device cuda --record-golden tests/kernels/test_ptx_*.py"
        )
    with np.load(path) as stored:
        recorded = {name.split("/")[0].split("-")[0] for name in stored.files}
    wanted = set()
    for source in HERE.glob("test_ptx_*.py"):
        for function in ast.parse(source.read_text()).body:
            if isinstance(function, ast.FunctionDef) and function.name.startswith("test_"):
                arguments = {argument.arg for argument in function.args.args}
                wanted |= {function.name} if arguments & {"device", "shuffled"} else set()
    assert wanted <= recorded
