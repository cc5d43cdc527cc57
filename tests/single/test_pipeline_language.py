"""Pipelines of language models as people write them: positions, masks, assertions, tied heads."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

import hvdx as hvd  # noqa: E402
from hvdx.errors import PipelineError, PlanError  # noqa: E402

SYMBOLS, WIDTH, LENGTH, ROWS = 11, 8, 6, 8


class Norm(nn.Module):
    """Reads its weight's shape, as hand-written norms do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return F.layer_norm(x, self.weight.shape, self.weight, None, 1e-5)


class Looking(nn.Module):
    """Attention by a mask that is a buffer and cut to the text, or by PyTorch's own function."""

    def __init__(self, by_hand, drop):
        super().__init__()
        self.by_hand, self.drop = by_hand, drop
        self.look, self.saw = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.tril(torch.ones(LENGTH, LENGTH)).view(1, 1, 6, 6))

    def forward(self, x):
        rows, length, width = x.size()
        q, k, v = self.look(x).split(WIDTH, dim=2)
        k = k.view(rows, length, 2, width // 2).transpose(1, 2)
        q = q.view(rows, length, 2, width // 2).transpose(1, 2)
        v = v.view(rows, length, 2, width // 2).transpose(1, 2)
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / 2.0
            scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
            y = F.dropout(scores.softmax(-1), self.drop, self.training) @ v
        else:
            drop = self.drop if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        return self.saw(y.transpose(1, 2).contiguous().view(rows, length, width))


class Block(nn.Module):
    def __init__(self, by_hand, drop):
        super().__init__()
        self.norm, self.looking = Norm(), Looking(by_hand, drop)
        self.mlp = nn.ModuleDict({"up": nn.Linear(WIDTH, 2 * WIDTH), "act": nn.GELU(),
                                  "down": nn.Linear(2 * WIDTH, WIDTH)})  # fmt: skip

    def forward(self, x):
        x = x + self.looking(self.norm(x))
        return x + self.mlp.down(self.mlp.act(self.mlp.up(self.norm(x))))


class Language(nn.Module):
    def __init__(self, by_hand=True, drop=0.0):
        super().__init__()
        self.symbols, self.places = nn.Embedding(SYMBOLS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(by_hand, drop) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, SYMBOLS, bias=False)
        self.head.weight = self.symbols.weight

    def forward(self, text, targets=None):
        length = text.shape[1]
        x = self.symbols(text) + self.places(torch.arange(0, length, device=text.device))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        if targets is not None:
            return F.cross_entropy(logits.view(-1, SYMBOLS), targets.view(-1))
        return logits


class Encoder(nn.Module):
    """PyTorch's own layers, whose mask is made for the text's length."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.symbols = nn.Embedding(SYMBOLS, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 16, drop, batch_first=True) for _ in range(2)
        )

    def forward(self, text):
        mask = nn.Transformer.generate_square_subsequent_mask(text.shape[1])
        x = self.symbols(text)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return x @ self.symbols.weight.T


def loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def batches(count=3):
    draw = torch.Generator().manual_seed(3)
    texts = [torch.randint(SYMBOLS, (ROWS, LENGTH + 1), generator=draw) for _ in range(count)]
    return [(text[:, :-1], text[:, 1:]) for text in texts]


def adam(params):
    return torch.optim.Adam(params, 1e-2)


def pipeline(model, **options):
    options = {"micro_batches": 4, "seed": 7, **options}
    return hvd.Pipeline(copy.deepcopy(model), batches(1)[0][0], loss, adam, **options)


def learnt(model, **options):
    """Return losses and the logits that come after them."""
    pipe = pipeline(model, **options)
    losses = [pipe.step(x, y) for x, y in batches()]
    found = pipe(batches(1)[0][0])
    pipe.close()
    return losses, found


def made(kind, *args):
    torch.manual_seed(1)
    return kind(*args)


@pytest.mark.parametrize("model", [(Language, True), (Language, False), (Encoder,)], ids=str)
def test_they_learn_what_the_plain_model_learns(model):
    plain = made(*model).double()
    one, out = learnt(plain, stages=1)
    for schedule, stages in (("1f1b", 2), ("zb1p", 4), ("interleaved", 4)):
        losses, found = learnt(plain, stages=stages, schedule=schedule)
        assert losses == one and torch.equal(found, out)
    optimizer = adam(plain.parameters())
    for (x, y), expected in zip(batches(), one, strict=True):
        optimizer.zero_grad()
        value = loss(plain(x), y)
        value.backward()
        optimizer.step()
        torch.testing.assert_close(value.detach(), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(plain.eval()(batches(1)[0][0]), out, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("by_hand", [True, False])
def test_dropout_in_functions_is_for_training_alone(by_hand):
    """Whatever mode the model is in when the pipeline is made."""
    model = made(Language, by_hand, 0.5)
    one = learnt(model, stages=1)[0]
    assert learnt(copy.deepcopy(model).eval().train(), stages=3)[0] == one
    assert one != learnt(made(Language, by_hand, 0.0))[0]
    pipe = pipeline(model.eval(), stages=2)
    x = batches(1)[0][0]
    torch.testing.assert_close(pipe(x), model(x).detach())
    assert torch.equal(pipe(x), pipe(x))
    pipe._graph.model.train()
    assert [pipe.step(x, y) for x, y in batches()] == one  # as if nobody had looked between
    pipe.close()


#: Not in the module, whose assertions pytest writes anew.
ASSERTING = """
def forward(self, text):
    assert text.shape[1] <= 6 and text.dim() == 2, "too long"
    assert text.shape[1] > 0
    return super(Asserting, self).forward(text)
class Asserting(Language):
    forward = forward
"""


def test_assertions_hold_for_each_batch():
    names = {"Language": Language}
    exec(compile(ASSERTING, "asserting.py", "exec"), names)
    model = made(names["Asserting"])
    assert learnt(model, stages=2)[0] == learnt(made(Language))[0]
    pipe = pipeline(model, stages=2)
    long = torch.zeros(ROWS, LENGTH + 1, dtype=torch.int64)
    with pytest.raises(PipelineError, match=r"asserted in asserting.py:3"):
        pipe.step(long, long)
    pipe.close()


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x) if self.training else x


class WithNoise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.noisy, self.b = nn.Linear(4, 4), Noisy(), nn.Linear(4, 4)

    def forward(self, x):
        return self.b(self.noisy(self.a(x)))


def test_other_calls_in_training_are_refused():
    model = WithNoise()
    told = r"module 'noisy' \(Noisy\) makes other calls in training .*leaves=\[Noisy\] keeps"
    with pytest.raises(PlanError, match=told):
        hvd.Pipeline(model, torch.ones(4, 4))
    pipe = hvd.Pipeline(model, torch.ones(4, 4), leaves=[Noisy], stages=3)
    torch.testing.assert_close(pipe(torch.ones(4, 4)), model.eval()(torch.ones(4, 4)).detach())
    pipe.close()
