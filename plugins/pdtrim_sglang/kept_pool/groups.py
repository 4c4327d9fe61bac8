"""All groups of cut layers of a decode worker: what each request holds of them, known on the host."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from pdtrim_sglang.kept_pool.group import KeptGroup
from pdtrim_sglang.kept_pool.rule import KeptRule


class KeptGroups:
    """Follows SGLang's requests by their row in `req_to_token`: admitted, one token longer, released.

    Attributes:
        groups: one for each distinct rule, in the order of layers.
        of_layer: cut layer -> place of its group in `groups`.

    """

    def __init__(
        self, rules: Mapping[int, KeptRule], pages: Mapping[KeptRule, int], page_size: int, device: torch.device | str
    ) -> None:
        distinct = list(dict.fromkeys(rules.values()))
        self.page_size = page_size
        self.groups = tuple(KeptGroup(rule, pages[rule], page_size, device) for rule in distinct)
        self.of_layer = {layer: distinct.index(rule) for layer, rule in rules.items()}

    def bind(self, requests: int, longest: int) -> None:
        """Make the tables, as `KeptGroup.bind`."""
        for group in self.groups:
            group.bind(requests, longest)
        # int64 [groups, requests]: prompt rows not kept, rows kept, pages held
        self._hidden, self._kept, self._held = np.zeros((3, len(self.groups), requests), dtype=np.int64)
        self._step = torch.zeros(0, dtype=torch.int64), np.zeros((len(self.groups), 0), dtype=np.int64)

    def clear(self) -> None:
        """No request is left."""
        for group in self.groups:
            group.clear()
        self._held[:] = 0

    def pages_for(self, prompt_tokens: int, generated: int) -> list[int]:
        """Pages of each group that a request takes."""
        return [-(-(group.rule.rows(prompt_tokens) + generated) // self.page_size) for group in self.groups]

    def admit(self, row: int, prompt_tokens: int, tokens: int) -> None:
        """A request has row `row` and `tokens` tokens, the first `prompt_tokens` of them its prompt.

        Raises:
            RuntimeError: a group has too few pages; nothing has been given.

        """
        assert row > 0
        assert not self._held[:, row].any()
        new = self.pages_for(prompt_tokens, tokens - prompt_tokens)
        self._require(new)
        for place, group in enumerate(self.groups):
            hidden = group.rule.hidden(prompt_tokens)
            group.admit(row, hidden, new[place])
            self._hidden[place, row], self._kept[place, row] = hidden, tokens - hidden
        self._held[:, row] = new

    def extend(self, rows: Tensor, lengths: Tensor) -> None:
        """The requests of `rows` have `lengths` tokens now, one more each; both int64 `[batch]`, on the host.

        Raises:
            RuntimeError: a group has too few pages; nothing has been given.

        """
        requests = rows.numpy()
        kept = lengths.numpy() - self._hidden[:, requests]
        new = -(-kept // self.page_size) > self._held[:, requests]
        self._require(new.sum(1).tolist())
        self._kept[:, requests] = kept
        self._step = lengths.clone(), kept
        if not new.any():
            return
        _, which = np.nonzero(new)
        moved = self._to_device(np.stack((requests[which], self._held[:, requests][new])))
        start = 0
        for group, count in zip(self.groups, new.sum(1).tolist(), strict=True):
            if count:
                group.extend(*moved[:, start : start + count])
                start += count
        self._held[:, requests] += new

    def release(self, row: int) -> None:
        """The request of `row` ends, or goes back to its queue."""
        for group, pages in zip(self.groups, self._held[:, row].tolist(), strict=True):
            if pages:
                group.release(row, pages)
        self._held[:, row] = 0

    def held_slots(self, place: int, row: int, tokens: int) -> Tensor:
        """int64 `[kept]`: the slots in group `place` of what a request keeps of its first `tokens`, prompt included."""
        return self.groups[place].table[row, : tokens - self._hidden[place, row]].long()

    def missing(self, requests: list[int]) -> bool:
        """Whether one token more of each of the requests, named by their rows, does not fit; `extend` then raises."""
        full = (self._kept[:, requests] == self._held[:, requests] * self.page_size).sum(1)
        return any(group.free_pages < new for group, new in zip(self.groups, full.tolist(), strict=True))

    def host_lengths(self, place: int, seq_lens: Tensor) -> Tensor | None:
        """Kept lengths in group `place` of the batch that `extend` saw last, when `seq_lens` are its, padded or not."""
        lengths, kept = self._step
        n = len(lengths)
        if n > len(seq_lens) or not torch.equal(seq_lens[:n].long(), lengths):
            return None
        return torch.cat((torch.from_numpy(kept[place]).to(seq_lens.dtype), seq_lens[n:]))

    def leaks(self) -> list[str]:
        """A sentence for each group that has pages out."""
        return [
            f"pdtrim: layers that keep {group.rule} prompt rows hold {group.pages - group.free_pages} of {group.pages} "
            "pages with no request left"
            for group in self.groups
            if group.free_pages != group.pages
        ]

    def _require(self, pages: list[int]) -> None:
        for group, new in zip(self.groups, pages, strict=True):
            if new > group.free_pages:
                raise RuntimeError(
                    f"pdtrim: layers that keep {group.rule} prompt rows have {group.free_pages} of {group.pages} pages "
                    f"left, {new} are needed: raise --max-total-tokens or lower --max-running-requests"
                )

    def _to_device(self, numbers: np.ndarray) -> Tensor:
        tensor, device = torch.from_numpy(numbers), torch.device(self.groups[0].device)
        return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
