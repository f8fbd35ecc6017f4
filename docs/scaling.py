"""Prints the tables of `scaling.md`: run `python docs/scaling.py`.

They are arithmetic from published rates. Nothing is measured.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    name: str
    flops: float  # per second, bf16
    hbm: float  # bytes per second
    link: float  # bytes per second, one way
    ring: int  # a dimension of a slice is a ring if this divides it, else a line
    dcn: float  # bytes per second: a chip's share of the data-centre network


V5E = Chip("v5e", 197e12, 819e9, 1600e9 / 8 / 4, 16, 6.4e12 / 8 / 256)
V5P = Chip("v5p", 459e12, 2765e9, 4800e9 / 8 / 6, 4, 50e9 / 8)
HOP = 1e-6  # seconds, estimated

TOKENS, HIDDEN, VOCAB = 8192, 4096, 262144  # TOKENS is per chip
VOCABS = 32000, 128256, 262144
BF16, FLOAT32 = 2, 4
TILE = 1024  # tokens: jaxkl's choice on TPUs for this many columns a chip


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Shards the vocabulary over `vocab` neighbours in the first dimension.

    Tokens are sharded over the rest of it, the other dimensions, and pods.
    """

    chip: Chip
    dimensions: tuple[int, ...]
    vocab: int
    pods: int = 1

    @property
    def token_shards(self):
        return math.prod(self.dimensions) * self.pods // self.vocab

    @property
    def columns(self):
        return VOCAB / self.vocab

    @property
    def tiles(self):
        return math.ceil(TOKENS / TILE)

    def is_ring(self, size):
        return size % self.chip.ring == 0

    def gemms(self):
        """Seconds for student logits, teacher logits, `d hidden` and `d kernel`."""
        return 4 * 2 * TOKENS * HIDDEN * self.columns / self.chip.flops

    def hbm(self, tiles=None):
        """Seconds to read and write all that is as large as a kernel or as logits.

        A tile reads two kernels. Its logits of both models are written once and read
        twice. Its gradient of the logits is written, copied, and read by two products,
        of which one reads a kernel and the other writes its gradient.
        """
        kernels = BF16 * (2 * (tiles or self.tiles) + 2) * HIDDEN
        logits = (2 * 3 * FLOAT32 + 5 * BF16) * TOKENS
        return (kernels + logits) * self.columns / self.chip.hbm

    @property
    def vocab_is_ring(self):
        return self.vocab == self.dimensions[0] and self.is_ring(self.vocab)

    def over_vocab(self, size):
        """Returns the bytes that a chip sends, and seconds."""
        sent = ring_all_reduce(size, self.vocab)
        return sent, sent / (self.chip.link * (2 if self.vocab_is_ring else 1))

    def statistics(self):
        """A token has 24 bytes, and a tile three all-reduces."""
        sent, seconds = self.over_vocab(24 * TOKENS)
        there_and_back = self.vocab if self.vocab_is_ring else 2 * (self.vocab - 1)
        return sent, seconds, self.tiles * 3 * there_and_back * HOP

    def d_hidden(self):
        """The sum is in float32, because every chip has a part of each number."""
        return self.over_vocab(FLOAT32 * TOKENS * HIDDEN)

    def d_kernel(self):
        """Returns bytes on a pod's links, seconds there, and seconds between pods.

        The sum runs over all dimensions that hold only tokens, at once. Then the part
        that is left on each chip is summed over the rest of the first dimension, where
        `vocab` groups share the links. The sum over pods is last.
        """
        size, link = BF16 * HIDDEN * self.columns, self.chip.link
        others = self.dimensions[1:]
        ways = sum(2 if self.is_ring(n) else 1 for n in others)
        sent = ring_all_reduce(size, math.prod(others))
        seconds = sent / (ways * link)
        size /= math.prod(others)
        rest = self.dimensions[0] // self.vocab
        more = ring_all_reduce(size, rest)
        ways = (2 if self.is_ring(self.dimensions[0]) else 1) / self.vocab
        between = ring_all_reduce(size / rest, self.pods)
        return sent + more, seconds + more / (ways * link), between / self.chip.dcn

    def communication(self):
        """Returns the seconds for statistics, `d hidden` and `d kernel`."""
        return sum(self.statistics()[1:]), self.d_hidden()[1], sum(self.d_kernel()[1:])

    def fewest_tokens(self):
        """Tokens a chip at which the GEMMs take as long as all communication.

        `d kernel` does not depend on tokens. The rest is assumed proportional to them.
        """
        statistics, d_hidden, d_kernel = self.communication()
        return TOKENS * d_kernel / (self.gemms() - statistics - d_hidden)


def ring_all_reduce(size, shards):
    """Returns the bytes that each shard sends."""
    return 2 * size * (shards - 1) / shards


def most_shards(chip, vocab, ways):
    """Vocabulary shards at which the sum of `d hidden` takes as long as the GEMMs."""
    return 1 + vocab * ways * chip.link / chip.flops


def most_shards_by_latency(chip, vocab):
    """Shards on a ring at which a tile's statistics take as long as its GEMMs."""
    return math.sqrt(4 * 2 * TILE * HIDDEN * vocab / chip.flops / (3 * HOP))


MESHES = [
    Mesh(V5E, (4, 4), 4),
    Mesh(V5E, (16, 16), 4),
    Mesh(V5E, (16, 16), 16),
    Mesh(V5E, (16, 16), 4, pods=16),
    Mesh(V5P, (4, 8, 8), 4),
    Mesh(V5P, (8, 4, 8), 8),
    Mesh(V5P, (16, 16, 16), 4),
    Mesh(V5P, (16, 16, 16), 8),
    Mesh(V5P, (16, 16, 16), 16),
]


def table(titles, lines):
    rules = [":--", *["--:"] * (len(titles) - 1)]
    return "\n".join("| " + " | ".join(x) + " |" for x in (titles, rules, *lines))


def name(mesh):
    chips = math.prod(mesh.dimensions) * mesh.pods
    pods = f", {mesh.pods} pods" if mesh.pods > 1 else ""
    return f"{chips} {mesh.chip.name}{pods}: {mesh.token_shards} × {mesh.vocab}"


def step_table():
    lines = []
    for mesh in MESHES:
        sent = mesh.statistics()[0], mesh.d_hidden()[0], mesh.d_kernel()[0]
        times = mesh.communication()
        lines.append(
            [
                name(mesh),
                f"{1e3 * mesh.gemms():.1f}",
                f"{1e3 * mesh.hbm():.1f}",
                f"{sent[0] / 1e6:.2f}",
                *(f"{x / 1e6:.0f}" for x in sent[1:]),
                *(f"{1e3 * x:.2f}" for x in times),
                f"{sum(times) / mesh.gemms():.1%}",
                f"{mesh.fewest_tokens():.0f}",
            ]
        )
    titles = [
        "chips: tokens × vocabulary",
        "GEMMs, ms",
        "HBM, ms",
        "statistics, MB",
        "d hidden, MB",
        "d kernel, MB",
        "statistics, ms",
        "d hidden, ms",
        "d kernel, ms",
        "all ÷ GEMMs",
        "equal at, tokens",
    ]
    return table(titles, lines)


def shards_table():
    lines = []
    for chip in (V5E, V5P):
        for form, ways in (("line", 1), ("ring", 2)):
            most = [most_shards(chip, vocab, ways) for vocab in VOCABS]
            lines.append(
                [f"d hidden, {chip.name}, {form}", *(f"{m:.0f}" for m in most)]
            )
    for chip in (V5E, V5P):
        most = [most_shards_by_latency(chip, vocab) for vocab in VOCABS]
        lines.append([f"latency, {chip.name}, ring", *(f"{m:.0f}" for m in most)])
    return table(["", *(f"V {vocab}" for vocab in VOCABS)], lines)


def facts():
    """Returns the numbers in the text of the page."""
    one_ring, two_rings = (
        chip.flops / (2 * ways * 2 * chip.link) for chip, ways in ((V5E, 1), (V5P, 2))
    )
    seconds = MESHES[3].d_kernel()[2]
    sent = seconds * V5E.dcn * math.prod(MESHES[3].dimensions)
    lines = [
        f"d kernel as long as the GEMMs at {one_ring:.0f} tokens on a ring of v5e, "
        f"{two_rings:.0f} on two of v5p",
        f"between 16 pods of v5e: {1e3 * seconds:.2f} ms, {sent / 1e9:.2f} GB a pod",
    ]
    for vocab, shards, ways in ((32000, 4, 1), (32000, 16, 2)):
        shares = [
            (shards - 1) / (most_shards(chip, vocab, ways) - 1) for chip in (V5E, V5P)
        ]
        lines.append(
            f"d hidden ÷ GEMMs, V {vocab}, m = {shards}: {shares[0]:.0%} on v5e, "
            f"{shares[1]:.0%} on v5p"
        )
    rows = 128  # tokens a chip in a tile, as compiled from plain `jit`
    tiles = math.ceil(TOKENS / rows)
    hbm = MESHES[0].hbm(tiles)
    lines.append(f"jit on 4 × 4 v5e: {tiles} tiles, {1e3 * hbm:.0f} ms of HBM")
    return "\n".join(lines)


if __name__ == "__main__":
    print(step_table(), shards_table(), facts(), sep="\n\n")
