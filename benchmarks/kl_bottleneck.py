"""kl_divergence and its relatives against eager torch and torch.compile.

    taskset -c 1 python benchmarks/kl_bottleneck.py            # one thread
    python benchmarks/kl_bottleneck.py --threads 2

Every case is forward + backward with the gradients to both sides. The peers are what torch users write: log_softmax of both
sides and F.kl_div, F.cross_entropy, randn and the closed form of the Gaussian KL; once as it stands and once compiled. The
paper's own size, (6, 10), is the cost of calls, not of arithmetic: there a run is 100 calls. The Gaussian sample takes part in
the loss with weight 0, so that the gradients of different noise can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from iumad_kernels import fused_linear_kl, gaussian_bottleneck, kl_bottleneck, kl_divergence

try:
    from harness import OURS, Case, Run, main
except ImportError:  # collected by pytest
    from benchmarks.harness import OURS, Case, Run, main

Loss = Callable[..., Tensor]


def torch_kl(student: Tensor, teacher: Tensor) -> Tensor:
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def torch_kl_weighted(student: Tensor, teacher: Tensor) -> Tensor:
    return 0.5 * torch_kl(student, teacher)


def torch_jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)
    m = torch.logaddexp(s, t) - 0.6931471805599453
    both = F.kl_div(m, t, reduction="batchmean", log_target=True) + F.kl_div(
        m, s, reduction="batchmean", log_target=True
    )
    return 0.5 * both


def torch_bottleneck(student: Tensor, teacher: Tensor) -> Tensor:
    labels = torch.arange(student.shape[0]) % student.shape[1]
    return (
        torch_kl(student, teacher.detach())
        + F.cross_entropy(teacher, labels)
        + F.cross_entropy(student, labels)
    )


def ours_bottleneck(student: Tensor, teacher: Tensor) -> Tensor:
    labels = torch.arange(student.shape[0]) % student.shape[1]
    return kl_bottleneck(teacher, student, labels).total


def torch_fused(fs: Tensor, ws: Tensor, ft: Tensor, wt: Tensor) -> Tensor:
    return torch_kl(F.linear(fs, ws), F.linear(ft, wt))


def ours_fused(fs: Tensor, ws: Tensor, ft: Tensor, wt: Tensor) -> Tensor:
    return fused_linear_kl(ft, wt, fs, ws)


def torch_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    sample = mu + (logvar / 2).exp() * torch.randn_like(mu)
    return sample.mean() * 0 + 0.5 * (logvar.exp() + mu**2 - 1 - logvar).sum(-1).mean()


def ours_gaussian(mu: Tensor, logvar: Tensor) -> Tensor:
    sample, kl = gaussian_bottleneck(mu, logvar, seed=1)
    return sample.mean() * 0 + kl.mean()


def repeated(loss: Loss, leaves: list[Tensor], calls: int) -> Run:
    def run() -> list[Tensor]:
        for _ in range(calls):
            for leaf in leaves:
                leaf.grad = None
            loss(*leaves).backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    return run


def leaves(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def case(
    name: str, ours: Loss, eager: Loss, *shapes: tuple[int, ...], calls: int = 1, memory: bool = False
) -> Case:
    def build() -> dict[str, Run]:
        contenders = {OURS: ours, "torch eager": eager, "torch.compile": torch.compile(eager)}
        return {which: repeated(loss, leaves(shapes), calls) for which, loss in contenders.items()}

    def expected() -> list[Tensor]:
        twins = [leaf.detach().double().requires_grad_() for leaf in leaves(shapes)]
        return repeated(eager, twins, 1)()

    return Case(
        name=f"{name} {' '.join(map(str, shapes))}{f', {calls} calls' if calls > 1 else ''}",
        build=build,
        expected=expected,
        tolerance=1e-5,
        memory=(OURS, "torch eager") if memory else (),
    )


def cases() -> list[Case]:
    result = []
    for rows, classes in ((1568, 768), (64, 32000)):
        shape = (rows, classes)
        result.append(case("kl_divergence", kl_divergence, torch_kl, shape, shape, memory=True))
        weighted = lambda s, t: 0.5 * kl_divergence(s, t)  # noqa: E731
        result.append(case("0.5 * kl_divergence", weighted, torch_kl_weighted, shape, shape))
        js = lambda s, t: kl_divergence(s, t, beta=0.5)  # noqa: E731
        result.append(case("Jensen-Shannon", js, torch_jensen_shannon, shape, shape))
        result.append(case("kl_bottleneck with labels", ours_bottleneck, torch_bottleneck, shape, shape))
    small = (6, 10)
    result.append(case("kl_divergence", kl_divergence, torch_kl, small, small, calls=100))
    result.append(
        case("kl_bottleneck with labels", ours_bottleneck, torch_bottleneck, small, small, calls=100)
    )
    heads = ((1024, 128), (16000, 128))
    result.append(case("fused_linear_kl", ours_fused, torch_fused, *heads, *heads, memory=True))
    for shape in ((1176, 128), (1568, 256)):
        result.append(case("gaussian_bottleneck", ours_gaussian, torch_gaussian, shape, shape))
    return result


if __name__ == "__main__":
    main("kl_bottleneck", cases, __file__)
