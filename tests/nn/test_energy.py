"""EnergyFusion: every encoder on the samples that have its modality, weighted as QMF does."""

import math

import pytest
import torch
from torch import Tensor, nn

import dynmm_kernels
from dynmm_kernels import Branch, EnergyFusion, Lazy, RoutedFusion, collate_modalities
from dynmm_kernels.nn import EnergyOutput

N, C = 9, 4
SIZES = {"text": 3, "image": 5, "sound": 2}
NAMES = [*SIZES]


class Counted(nn.Module):
    """A linear encoder that remembers the rows it was given and refuses nan."""

    def __init__(self, size: int, classes: int = C) -> None:
        super().__init__()
        self.linear = nn.Linear(size, classes, dtype=torch.float64)
        self.rows: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        assert not x.isnan().any()
        self.rows.append(len(x))
        return self.linear(x)


def encoders() -> dict[str, nn.Module]:
    return {name: Counted(size) for name, size in SIZES.items()}


def batch(rows: int = N) -> dict[str, Tensor]:
    return {
        name: torch.randn(rows, size, dtype=torch.float64, requires_grad=True)
        for name, size in SIZES.items()
    }


def some() -> Tensor:
    """Who has what: one sample nothing, one everything."""
    present = torch.rand(N, 3) < 0.6
    present[0], present[1] = False, True
    return present


def plain(fusion: EnergyFusion, inputs: dict, present: Tensor, targets: Tensor) -> list[Tensor]:
    """Fused logits, confidences and losses, sample by sample."""
    fused, confidences, losses = [], [], []
    for n in range(len(present)):
        total = torch.zeros(C, dtype=torch.float64)
        confidence, loss = [], []
        for m, (encoder, name) in enumerate(zip(fusion.encoders, SIZES, strict=True)):
            if not present[n, m]:
                confidence.append(total.new_zeros(()))
                loss.append(total.new_zeros(()))
                continue
            row = encoder.module.linear(inputs[name][n])
            energy = fusion.scale * row.logsumexp(0)
            confidence.append(energy)
            loss.append(nn.functional.cross_entropy(row, targets[n]))
            total = total + (energy.detach() if fusion.detach_confidence else energy) * row
        fused.append(total)
        confidences.append(torch.stack(confidence))
        losses.append(torch.stack([*loss, nn.functional.cross_entropy(total, targets[n])]))
    return [torch.stack(fused), torch.stack(confidences), torch.stack(losses)]


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("partial", [False, True], ids=["whole", "partial"])
def test_values_and_gradients(backend, detach, partial):
    fusion = EnergyFusion(encoders(), detach_confidence=detach)
    inputs, targets = batch(), torch.randint(0, C, (N,))
    present = some() if partial else torch.ones(N, 3, dtype=torch.bool)
    got = fusion(inputs, targets=targets, present=present if partial else None)
    wanted = plain(fusion, inputs, present, targets)
    incoming = [torch.randn_like(part) for part in wanted]
    leaves = [*fusion.parameters(), *inputs.values()]
    grads = []
    for parts in ([got.fused, got.confidence, got.losses], wanted):
        for ours, theirs in zip(parts, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        grads.append(torch.autograd.grad(parts, leaves, incoming))
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-12)


def test_an_encoder_runs_on_its_own_samples_only(backend):
    fusion, inputs, present = EnergyFusion(encoders()), batch(), some()
    for m, name in enumerate(SIZES):
        inputs[name] = inputs[name].detach().masked_fill(~present[:, m, None], math.nan)
    got = fusion(inputs, present=present, return_details=True)
    assert [encoder.module.rows for encoder in fusion.encoders] == [
        [count] for count in present.sum(0).tolist()
    ]
    assert got.fused.isfinite().all()
    assert not got.fused[0].any()
    for m, name in enumerate(SIZES):
        assert got.logits[name][~present[:, m]].count_nonzero() == 0


def test_named_presence(backend):
    fusion, inputs, present = EnergyFusion(encoders()), batch(), some()
    present[:, 1] = True
    named = {"text": present[:, 0], "sound": present[:, 2]}
    torch.testing.assert_close(fusion(inputs, present=named), fusion(inputs, present=present))


def test_a_modality_that_is_none(backend):
    fusion, inputs = EnergyFusion(encoders()), batch()
    mask = torch.ones(N, 3, dtype=torch.bool)
    mask[:, 1] = False
    wanted = fusion(inputs, present=mask)
    got = fusion({**inputs, "image": None})
    torch.testing.assert_close(got, wanted)
    got.sum().backward()
    assert fusion.encoders[1].module.rows == []
    for parameter in fusion.encoders[1].parameters():
        assert not parameter.grad.any()
    partial = some()
    torch.testing.assert_close(
        fusion({**inputs, "image": None}, present=partial), fusion(inputs, present=partial & mask)
    )


def test_nobody_has_anything(backend):
    fusion, inputs = EnergyFusion(encoders()).train(), batch()
    targets, nothing = torch.zeros(N, dtype=torch.int64), torch.zeros(N, 3, dtype=torch.bool)
    fused, logits, confidence, losses = fusion(inputs, targets=targets, present=nothing)
    assert not fused.any()
    assert not confidence.any()
    assert all(not logit.any() for logit in logits.values())
    torch.testing.assert_close(losses[:, -1], torch.full((N,), math.log(C), dtype=torch.float64))
    (fused.sum() + losses.sum()).backward()
    for parameter in fusion.parameters():
        assert not parameter.grad.any()


def test_batches_of_none_and_one(backend):
    fusion = EnergyFusion(encoders())
    assert fusion(batch(0)).shape == (0, C)
    assert fusion(batch(0), present=torch.ones(0, 3, dtype=torch.bool)).shape == (0, C)
    inputs = batch(1)
    one = torch.tensor([[False, True, False]])
    row = fusion.encoders[1].module.linear(inputs["image"])
    wanted = 0.1 * row.logsumexp(1, keepdim=True) * row
    torch.testing.assert_close(fusion(inputs, present=one), wanted)


def test_call_shapes(backend):
    """By name, by position, by Branch; a tuple is splatted."""

    class Pair(nn.Module):
        def __init__(self, encoder: nn.Module) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, x: Tensor, scale: Tensor) -> Tensor:
            return self.encoder(x * scale)

    text, image, _ = encoders().values()
    a, b, _ = batch().values()
    ones = torch.ones(N, 1, dtype=torch.float64)
    wanted = EnergyFusion({"text": text, "image": image})({"text": a, "image": b})
    by_branch = [Branch(Pair(text), inputs=[0, 2]), Branch(image, inputs=lambda a, b, c: b)]
    for got in (
        EnergyFusion([text, image])(a, b),
        EnergyFusion([text, image])([a, b]),
        EnergyFusion({"text": text, "image": image})(a, b),
        EnergyFusion(by_branch)(a, b, ones),
        EnergyFusion({"text": Pair(text), "image": image})({"text": (a, ones), "image": b}),
    ):
        torch.testing.assert_close(got, wanted)


def test_details(backend):
    named, listed = EnergyFusion(encoders()), EnergyFusion([*encoders().values()])
    details = named(batch(), return_details=True)
    assert isinstance(details, EnergyOutput)
    assert [*details.logits] == NAMES
    assert details.losses is None
    assert details.confidence.requires_grad
    assert isinstance(listed(*batch().values(), return_details=True).logits, tuple)


@pytest.mark.parametrize("weights", ["softmax", "uniform"])
def test_other_weights(backend, weights):
    fusion, inputs = EnergyFusion(encoders(), weights=weights), batch()
    logits = torch.stack(
        [e.module.linear(x) for e, x in zip(fusion.encoders, inputs.values(), strict=True)]
    )
    shares = torch.full((3, N), 1 / 3, dtype=torch.float64)
    if weights == "softmax":
        shares = (0.1 * logits.logsumexp(2)).softmax(0)
    torch.testing.assert_close(fusion(inputs), (shares[..., None] * logits).sum(0))


def test_weights_of_a_network(backend):
    """They carry the gradient that they have."""
    inputs, network = batch(), nn.Linear(3 * C, 3, dtype=torch.float64)
    fusion = EnergyFusion(encoders(), weights=lambda logits: network(torch.cat(logits, 1)))
    fused = fusion(inputs)
    logits = [e.module.linear(x) for e, x in zip(fusion.encoders, inputs.values(), strict=True)]
    weights = network(torch.cat(logits, 1))
    wanted = sum(weights[:, m : m + 1] * row for m, row in enumerate(logits))
    leaves = [*network.parameters(), *fusion.parameters()]
    incoming = torch.randn_like(wanted)
    torch.testing.assert_close(fused, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(fused, leaves, incoming), torch.autograd.grad(wanted, leaves, incoming)
    )


def test_lazy_modalities_are_fetched_for_who_has_them(backend):
    fusion, inputs, present = EnergyFusion(encoders()), batch(), some()
    wanted = fusion(inputs, present=present)
    asked = []

    def fetch(indices: Tensor) -> Tensor:
        asked.append(indices.tolist())
        return inputs["image"][indices]

    torch.testing.assert_close(fusion({**inputs, "image": Lazy(fetch)}, present=present), wanted)
    assert asked == [present[:, 1].nonzero()[:, 0].tolist()]


def test_under_autocast(backend):
    """Encoders that end in different dtypes."""
    fusion = EnergyFusion([nn.Linear(3, C), nn.Sequential(nn.Linear(5, C), nn.Softmax(1))])
    with torch.autocast("cpu", torch.bfloat16):
        fused = fusion(torch.randn(N, 3), torch.randn(N, 5))
    assert fused.isfinite().all()


def test_batch_norm_sees_the_samples_that_are_there(backend):
    norm = nn.BatchNorm1d(3, momentum=1.0, dtype=torch.float64)
    fusion = EnergyFusion([nn.Sequential(norm, Counted(3)), Counted(5)]).train()
    text, image, _ = batch().values()
    present = some()[:, :2]
    fusion(text, image, present=present)
    torch.testing.assert_close(norm.running_mean, text[present[:, 0]].mean(0).detach())


def test_presence_of_branches(backend):
    """A mask of what is there also chooses the branches of a RoutedFusion."""
    parts, inputs, present = encoders(), batch(), some()
    gate = nn.Linear(3, 3, dtype=torch.float64)
    branches = {name: Branch(part, inputs=name) for name, part in parts.items()}
    fusion = RoutedFusion(Branch(gate, inputs="text"), branches, select="multi_hot")
    wanted = sum(
        torch.where(present[:, m, None], parts[name].linear(inputs[name]), 0.0)
        for m, name in enumerate(SIZES)
    )
    for execution in ("routed", "masked"):
        fusion.execution = execution
        output, routing = fusion(inputs, choice=present, return_routing=True)
        torch.testing.assert_close(output, wanted)
        assert routing.counts == tuple(present.sum(0).tolist())
    grads = [
        torch.autograd.grad(out.sum(), [*fusion.branches.parameters()]) for out in (output, wanted)
    ]
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match=r"choice must have shape \[N, B\] = \[9, 3\].*\[9, 2\]"):
        fusion(inputs, choice=present[:, :2])


def test_collate():
    samples = [
        {"text": torch.ones(3), "label": 1},
        {"text": None, "image": torch.full((2, 2), 2.0), "label": 0},
        {"image": torch.full((2, 2), 3.0), "label": 2, "sound": None},
    ]
    inputs, present = collate_modalities(samples, ["text", "image", "sound"])
    assert [*inputs] == ["text", "image", "sound"] == [*present]
    assert inputs["sound"] is None
    assert inputs["image"][:, 0, 0].tolist() == [0, 2, 3]
    assert {name: here.tolist() for name, here in present.items()} == {
        "text": [True, False, False],
        "image": [False, True, True],
        "sound": [False] * 3,
    }
    assert [*collate_modalities(samples).inputs] == ["text", "label", "image", "sound"]
    nested, _ = collate_modalities([{"a": (torch.ones(2), 1)}, {}])
    assert nested["a"][1].tolist() == [1, 0]


def test_collated_samples_are_fused(backend):
    fusion = EnergyFusion(encoders())
    samples = [
        {
            name: torch.randn(size, dtype=torch.float64)
            for name, size in SIZES.items()
            if (n + size) % 3
        }
        for n in range(N)
    ]
    inputs, present = collate_modalities(samples, NAMES)
    whole = fusion(inputs, present=present)
    for n, sample in enumerate(samples):
        alone = {name: sample[name][None] if name in sample else None for name in SIZES}
        torch.testing.assert_close(whole[n : n + 1], fusion(alone))


BAD = {
    "no encoders": (lambda f, x: EnergyFusion([]), ValueError, "encoders is empty"),
    "no sequence": (lambda f, x: EnergyFusion(nn.Linear(1, 1)), TypeError, "a sequence or a dict"),
    "weights": (
        lambda f, x: EnergyFusion([nn.Identity()], weights="best"),
        ValueError,
        "'softmax'",
    ),
    "everything None": (
        lambda f, x: f(dict.fromkeys(SIZES)),
        ValueError,
        "every modality is None",
    ),
    "a name that is missing": (
        lambda f, x: f({"text": x["text"], "image": None}),
        ValueError,
        "encoder 'sound' reads modality 'sound'.*give None",
    ),
    "too few inputs": (
        lambda f, x: f(x["text"], x["image"]),
        ValueError,
        "one input per encoder, 3",
    ),
    "present's dtype": (
        lambda f, x: f(x, present=torch.ones(N, 3)),
        TypeError,
        "present must be a bool tensor",
    ),
    "present's shape": (
        lambda f, x: f(x, present=torch.ones(N, 2, dtype=torch.bool)),
        ValueError,
        r"\[9, 3\]; got \[9, 2\]",
    ),
    "present's name": (
        lambda f, x: f(x, present={"smell": torch.ones(N, dtype=torch.bool)}),
        ValueError,
        "'sound'; got 'smell'",
    ),
    "present's length": (
        lambda f, x: f(x, present={"text": torch.ones(2, dtype=torch.bool)}),
        ValueError,
        r"got \[2, 3\]",
    ),
    "another number of classes": (
        lambda f, x: EnergyFusion([Counted(3), Counted(5, 7)])(x["text"], x["image"]),
        ValueError,
        r"encoder '1'.*\[7\].*\[4\]",
    ),
    "no logits": (
        lambda f, x: EnergyFusion([Branch(nn.Flatten(0), inputs=0)])(x["text"]),
        ValueError,
        r"encoder '0' must return logits \[n, C\]; got \[27\]",
    ),
    "weights of another shape": (
        lambda f, x: EnergyFusion([Counted(3)], weights=lambda logits: logits[0])(x["text"]),
        ValueError,
        r"weights must be .*\[9, 1\]",
    ),
    "no number of samples": (
        lambda f, x: EnergyFusion([Counted(3)])(Lazy(lambda rows: x["text"][rows])),
        ValueError,
        "number of samples is unknown",
    ),
    "a name to collate": (
        lambda f, x: collate_modalities([{"a": torch.ones(1)}], ["b"]),
        ValueError,
        "no sample has 'b'",
    ),
    "nothing to collate": (lambda f, x: collate_modalities([]), ValueError, "at least one sample"),
    "shapes that differ": (
        lambda f, x: collate_modalities([{"a": torch.ones(1)}, {"a": torch.ones(2)}]),
        ValueError,
        "modality 'a'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call(EnergyFusion(encoders()), batch())


def test_an_exception_names_the_encoder():
    with pytest.raises(RuntimeError) as caught:
        EnergyFusion({"text": Counted(3)})(torch.zeros(2, 4, dtype=torch.float64))
    assert caught.value.__notes__ == ["in encoder 'text'"]


def test_no_wait_where_nothing_is_absent(backend, monkeypatch):
    """Without a mask nobody sorts."""
    monkeypatch.setattr(dynmm_kernels.functional.sorting, "route", None)
    assert EnergyFusion(encoders())(batch()).shape == (N, C)
