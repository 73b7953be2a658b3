"""Choosing the next token over the published vocabulary."""

from collections.abc import Iterator

import torch
from torch import Tensor

from tokenspeed.ops import sampling

from ..cases import Case, Inputs, Sizes, optional_peer

VOCABULARY = 248320
CUTS = {
    "greedy": (0.0, 0, 1.0),
    "temperature": (0.8, 0, 1.0),
    "top-k 20, top-p 0.95": (0.8, 20, 0.95),
    "top-p 0.95": (0.8, 0, 0.95),
}
_flashinfer_draw = optional_peer("flashinfer.sampling", "top_k_top_p_sampling_from_logits")


def _flashinfer(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *rest) -> Tensor:
    scaled = logits.float() / temperature[:, None]
    return _flashinfer_draw(scaled, torch.where(top_k > 0, top_k, VOCABULARY), top_p, filter_apply_order="top_k_first")


def _softmax_multinomial(logits: Tensor, temperature: Tensor, *rest) -> Tensor:
    return torch.softmax(logits.float() / temperature[:, None], -1).multinomial(1)


def cases(sizes: Sizes) -> Iterator[Case]:
    """Each kind of cut; logits of one row are half a megabyte, so the time is two launches and the noise."""
    for rows in (1, 64) if len(sizes.decode) > 1 else (1,):
        for name, (temperature, top_k, top_p) in CUTS.items():

            def row(draw: Inputs, rows=rows, temperature=temperature, top_k=top_k, top_p=top_p) -> tuple:
                def spread(value, dtype=torch.float32):
                    return draw.integers([value] * rows, dtype)

                return (
                    draw.randn(rows, VOCABULARY) * 3,
                    spread(temperature),
                    spread(top_k, torch.int32),
                    spread(top_p),
                    spread(0.0),
                    draw.integers(range(rows), torch.int64),
                    spread(17, torch.int64),
                )

            if name == "greedy":
                peers = {"argmax": lambda logits, *rest: logits.argmax(-1)}
            else:
                peers = {"FlashInfer": _flashinfer if _flashinfer_draw else None}
                if rows == 1:  # milliseconds, and more of them for more rows
                    peers["torch"] = sampling.sample.__wrapped__
            if name == "temperature":
                peers["softmax and multinomial"] = _softmax_multinomial
            run = torch.ops.tokenspeed.sample.default
            yield Case("sample", f"{rows} rows, {name}", rows * VOCABULARY * 2, row, run, peers=peers)
