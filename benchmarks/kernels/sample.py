"""Choosing the next token over the published vocabulary."""

from collections.abc import Callable, Iterator

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
SEED = {"seed": 17, "offset": 0}  # given, so that no generator on the host is asked for them
_sampling = optional_peer("flashinfer", "sampling")


def _flashinfer(name: str) -> Callable:
    """FlashInfer's function for this cut, of all rows."""

    def choose(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, *rest) -> Tensor:
        if name == "top-p 0.95":
            return _sampling.top_p_sampling_from_probs(_sampling.softmax(logits.float(), temperature), top_p, **SEED)
        scaled = logits.float() / temperature[:, None]
        if name == "temperature":
            return _sampling.sampling_from_logits(scaled, **SEED)
        most = {"top_k_max": CUTS[name][1]}  # an engine knows it; without it a slower path
        return _sampling.top_k_top_p_sampling_from_logits(scaled, top_k, top_p, **most, **SEED)

    return choose


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
                peers: dict = {"argmax": lambda logits, *rest: logits.argmax(-1)}
            else:
                peers = {"FlashInfer": _flashinfer(name) if _sampling else None}
                if rows == 1:  # milliseconds, and more of them for more rows
                    peers["torch"] = sampling.sample.__wrapped__
            if name == "temperature":
                peers["softmax and multinomial"] = _softmax_multinomial
            run = torch.ops.tokenspeed.sample.default
            yield Case("sample", f"{rows} rows, {name}", rows * VOCABULARY * 2, row, run, peers=peers)
