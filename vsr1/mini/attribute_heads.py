"""Map rendered attributes linearly: to vectors (the attribute probe), and from states (heads of pretraining)."""

import torch
import torch.nn.functional as F

from vsr1.mini import world
from vsr1.mini.world import ATTRIBUTES, PLACES

LAST_SECOND = 200  # of any video, as the tokenizer's numbers


def attribute_ids() -> dict[tuple[str, str], int]:
    """Return a number for every (attribute, value) of the world."""
    pairs = dict.fromkeys(
        (n, value) for n in ATTRIBUTES for data in PLACES for value in world.values(n, data)
    )
    return {pair: number for number, pair in enumerate(pairs)}


def probe_vecs(probe: torch.Tensor, moments: list[world.Moment]) -> torch.Tensor:
    """Return (M, D) unit vectors: a linear map of the seven attributes of each moment.

    probe  (attribute values, D)
    """
    ids = attribute_ids()
    rows = torch.tensor([[ids[name, getattr(m, name)] for name in ATTRIBUTES] for m in moments])  # (M, 7)
    return F.normalize(probe[rows].sum(dim=1), dim=-1)


def attribute_loss(logits: torch.Tensor, labels: list[dict], names=ATTRIBUTES) -> tuple[torch.Tensor, dict]:
    """Return the mean cross-entropy over attributes, and the accuracy of each.

    logits  (N, values + 1): a column a value, and one for none
    labels  N attributes by name; None where nothing is to be seen
    """
    ids, loss, accuracies = attribute_ids(), 0.0, {}
    none = len(ids)
    for name in names:
        columns = torch.tensor([*(number for (kind, _), number in ids.items() if kind == name), none])
        targets = torch.tensor([ids.get((name, label[name]), none) for label in labels])
        loss = loss + F.cross_entropy(logits[:, columns], torch.searchsorted(columns, targets))
        accuracies[name] = (columns[logits[:, columns].argmax(1)] == targets).float().mean()
    return loss / len(names), accuracies


# --- Heads on the states of the language model


def new_heads(width: int) -> torch.nn.Parameter:
    """Return (2 (values + 1) + seconds, width) random linear heads for `pair_loss` and `target_loss`."""
    rows = 2 * (len(attribute_ids()) + 1) + LAST_SECOND
    return torch.nn.Parameter(0.01 * torch.randn(rows, width))


def pair_loss(states: torch.Tensor, heads: torch.Tensor, pairs: list[dict]) -> tuple[torch.Tensor, dict]:
    """Return (loss, accuracies) of what is read where a pair of frames ends: see `pretraining_data.pair_labels`.

    What the pair shows, the action of the pair before, and its whole second.

    states  (P, D)
    """
    count = len(attribute_ids()) + 1
    logits = F.rms_norm(states, states.shape[-1:]) @ heads[: 2 * count].T  # (P, 2 (values + 1))
    loss, accuracies = attribute_loss(logits[:, :count], pairs)
    before = [{"action": pair["before"]} for pair in pairs]
    before_loss, _ = attribute_loss(logits[:, count:], before, ("action",))
    time_loss, accuracies["second"] = second_loss(states, heads, [pair["second"] for pair in pairs])
    return 1.25 * loss + 0.25 * before_loss + 0.25 * time_loss, accuracies


def target_loss(states: torch.Tensor, heads: torch.Tensor, targets: list[dict]) -> tuple[torch.Tensor, dict]:
    """Return (loss, accuracies) of the same heads where a time is named: action and object of the moment asked for.

    states  (M, D)
    """
    logits = F.rms_norm(states, states.shape[-1:]) @ heads[: len(attribute_ids()) + 1].T
    return attribute_loss(logits, targets, ("action", "object"))


def second_loss(
    states: torch.Tensor, heads: torch.Tensor, seconds: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, accuracy) of the same heads for whole seconds, (M,): of a pair, or of the moment to be looked up.

    states  (M, D)
    """
    logits, right = F.rms_norm(states, states.shape[-1:]) @ heads[-LAST_SECOND:].T, torch.tensor(seconds)
    return F.cross_entropy(logits, right), (logits.argmax(1) == right).float().mean()
