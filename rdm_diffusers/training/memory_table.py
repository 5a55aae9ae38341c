"""What a memory plan says, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# What a plan calls the networks that are trained, and their optimisers, by how many there are.
LORAS, FULL = {1: "one LoRA", 2: "two LoRAs"}, {1: "student", 2: "student and fake score"}
OPTIMISERS = {1: "one optimiser", 2: "two optimisers"}
NOT_COUNTED = "the CUDA context (0.3 to 0.5 GiB), the allocator's fragmentation, kernels' workspaces"


@dataclass(frozen=True)
class MemoryPlan:
    """An estimate of one device's memory."""

    sizes: dict[str, int]  # bytes by purpose; not all are needed at once
    phases: dict[str, int]  # each phase's peak in bytes
    parameters: dict[str, int]  # how many each component and one LoRA (`lora`) have
    lora_layers: int  # how many layers a LoRA adapts; 0 for full students
    not_counted: tuple[str, ...]  # what of the rewards is not known
    prompt_size: int  # bytes of one prompt's embeddings, at most

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(self.phases.values())

    def as_table(self) -> str:
        """Plain text in millions of parameters and GiB; the last line is the peak."""

        def gib(sizes: dict[str, int]) -> list[str]:
            return [f"{name:<40}{size / GIB:>12.2f} GiB" for name, size in sizes.items()]

        lines = [f"{name:<40}{count / 1e6:>12,.1f} M parameters" for name, count in self.parameters.items()]
        if self.lora_layers:
            lines.append(f"{'layers with a LoRA':<40}{self.lora_layers:>12,}")
        lines.append(f"{'embeddings of a prompt, at most':<40}{self.prompt_size / 1e6:>12.2f} MB")
        lines += ["", "what a device holds, not all of it at once (estimated)"]
        lines += gib({name: size for name, size in self.sizes.items() if size})
        without = ", ".join([NOT_COUNTED, *self.not_counted])
        lines += ["", f"the most of each phase (estimated); not counted: {without}", *gib(self.phases)]
        return "\n".join([*lines, "", *gib({"peak, estimated": self.peak})])
