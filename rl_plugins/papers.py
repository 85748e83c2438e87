"""Papers behind the methods, in a table from which model cards cite; docs/papers.md compares our code with them."""

from typing import NamedTuple


class Paper(NamedTuple):
    """A paper that a method comes from.

    Args:
        title: As published.
        authors: For BibTeX.
        year: Of the first version.
        arxiv: Number at arXiv; `None` where it is not there.
        venue: Journal or page, where there is no number at arXiv.
    """

    title: str
    authors: str
    year: int
    arxiv: str | None = None
    venue: str | None = None

    @property
    def url(self) -> str | None:
        """Page of the paper, where it is known."""
        return None if self.arxiv is None else f"https://huggingface.co/papers/{self.arxiv}"

    @property
    def link(self) -> str:
        """Title as a Markdown link, or with the venue where there is no page."""
        return f"{self.title} ({self.venue}, {self.year})" if self.url is None else f"[{self.title}]({self.url})"

    def bibtex(self, key: str) -> str:
        """Make the entry of a bibliography.

        Args:
            key: Key by which texts cite the paper.
        """
        journal = self.venue or f"arXiv preprint arXiv:{self.arxiv}"
        fields = {
            "title": f"{{{{{self.title}}}}}",
            "author": f"{{{self.authors}}}",
            "year": str(self.year),
            "journal": f"{{{journal}}}",
        }
        lines = [f"    {name:<7} = {value}," for name, value in fields.items()]
        return "\n".join([f"@article{{{key},", *lines, "}"])


PAPERS: dict[str, Paper] = {
    "gae": Paper(
        "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
        "John Schulman and Philipp Moritz and Sergey Levine and Michael Jordan and Pieter Abbeel",
        2015,
        "1506.02438",
    ),
    "ppo": Paper(
        "Proximal Policy Optimization Algorithms",
        "John Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov",
        2017,
        "1707.06347",
    ),
    "instruct_gpt": Paper(
        "Training language models to follow instructions with human feedback", "Ouyang and others", 2022, "2203.02155"
    ),
    "reinforce": Paper(
        "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
        "Ronald J. Williams",
        1992,
        venue="Machine Learning 8",
    ),
    "vc_ppo": Paper(
        "What's Behind PPO's Collapse in Long-CoT? Value Optimization Holds the Secret",
        "Yuan and others",
        2025,
        "2503.01491",
    ),
    "vapo": Paper(
        "VAPO: Efficient and Reliable Reinforcement Learning for Advanced Reasoning Tasks",
        "Yue and others",
        2025,
        "2504.05118",
    ),
    "ppg": Paper("Phasic Policy Gradient", "Cobbe and others", 2020, "2009.04416"),
    "mtp": Paper(
        "Better & Faster Large Language Models via Multi-token Prediction", "Gloeckle and others", 2024, "2404.19737"
    ),
    "deepseek_v3": Paper("DeepSeek-V3 Technical Report", "DeepSeek-AI", 2024, "2412.19437"),
    "speculative_decoding": Paper(
        "Fast Inference from Transformers via Speculative Decoding",
        "Yaniv Leviathan and Matan Kalman and Yossi Matias",
        2022,
        "2211.17192",
    ),
    "speculative_sampling": Paper(
        "Accelerating Large Language Model Decoding with Speculative Sampling", "Chen and others", 2023, "2302.01318"
    ),
    "switch": Paper(
        "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
        "William Fedus and Barret Zoph and Noam Shazeer",
        2021,
        "2101.03961",
    ),
    "global_batch": Paper(
        "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models",
        "Qiu and others",
        2025,
        "2501.11873",
    ),
    "st_moe": Paper(
        "ST-MoE: Designing Stable and Transferable Sparse Expert Models", "Zoph and others", 2022, "2202.08906"
    ),
    "loss_free": Paper(
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", "Wang and others", 2024, "2408.15664"
    ),
    "quantile": Paper("MoE travelogue 6: Quantile Balancing", "Jianlin Su", 2026, venue="kexue.fm/archives/11619"),
    "grpo": Paper(
        "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
        "Shao and others",
        2024,
        "2402.03300",
    ),
    "dr_grpo": Paper(
        "Understanding R1-Zero-Like Training: A Critical Perspective", "Liu and others", 2025, "2503.20783"
    ),
    "dapo": Paper(
        "DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "Yu and others", 2025, "2503.14476"
    ),
    "gspo": Paper("Group Sequence Policy Optimization", "Zheng and others", 2025, "2507.18071"),
    "luspo": Paper(
        "Length-Unbiased Sequence Policy Optimization: Revealing and Controlling Response Length Variation in RLVR",
        "Liu and others",
        2026,
        "2602.05261",
    ),
    "gmpo": Paper("Geometric-Mean Policy Optimization", "Zhao and others", 2025, "2507.20673"),
    "cispo": Paper(
        "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", "MiniMax", 2025, "2506.13585"
    ),
    "scale_rl": Paper(
        "The Art of Scaling Reinforcement Learning Compute for LLMs", "Khatri and others", 2025, "2510.13786"
    ),
    "sapo": Paper("Soft Adaptive Policy Optimization", "Gao and others", 2025, "2511.20347"),
    "vespo": Paper(
        "VESPO: Variational Sequence-Level Soft Policy Optimization for Stable Off-Policy LLM Training",
        "Shen and others",
        2026,
        "2602.10693",
    ),
    "gpg": Paper(
        "GPG: A Simple and Strong Reinforcement Learning Baseline for Model Reasoning",
        "Chu and others",
        2025,
        "2504.02546",
    ),
    "gvpo": Paper(
        "GVPO: Group Variance Policy Optimization for Large Language Model Post-Training",
        "Zhang and others",
        2025,
        "2504.19599",
    ),
    "dppo": Paper("Rethinking the Trust Region in LLM Reinforcement Learning", "Qi and others", 2026, "2602.04879"),
    "fipo": Paper(
        "FIPO: Eliciting Deep Reasoning with Future-KL Influenced Policy Optimization",
        "Ma and others",
        2026,
        "2603.19835",
    ),
    "bapo": Paper(
        "BAPO: Stabilizing Off-Policy Reinforcement Learning for LLMs via Balanced Policy Optimization with Adaptive "
        "Clipping",
        "Xi and others",
        2025,
        "2510.18927",
    ),
    "cpgd": Paper(
        "CPGD: Toward Stable Rule-based Reinforcement Learning for Language Models",
        "Liu and others",
        2025,
        "2505.12504",
    ),
    "entropy": Paper(
        "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
        "Cui and others",
        2025,
        "2505.22617",
    ),
    "rloo": Paper(
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "Ahmadian and others",
        2024,
        "2402.14740",
    ),
    "opo": Paper("On-Policy RL with Optimal Reward Baseline", "Hao and others", 2025, "2505.23585"),
    "maxrl": Paper("Maximum Likelihood Reinforcement Learning", "Tajwar and others", 2026, "2602.02710"),
    "reinforce++": Paper(
        "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
        "Hu and others",
        2025,
        "2501.03262",
    ),
    "reinforce_rej": Paper(
        "A Minimalist Approach to LLM Reasoning: from Rejection Sampling to Reinforce",
        "Xiong and others",
        2025,
        "2504.11343",
    ),
    "lite_ppo": Paper(
        "Part I: Tricks or Traps? A Deep Dive into RL for LLM Reasoning", "Liu and others", 2025, "2508.08221"
    ),
    "pass_at_k": Paper(
        "Pass@k Training for Adaptively Balancing Exploration and Exploitation of Large Reasoning Models",
        "Chen and others",
        2025,
        "2508.10751",
    ),
    "pkpo": Paper(
        "Pass@K Policy Optimization: Solving Harder Reinforcement Learning Problems",
        "Walder and Karkhanis",
        2025,
        "2505.15201",
    ),
    "krpo": Paper(
        "Kalman Filter Enhanced GRPO for Reinforcement Learning-Based Language Model Reasoning",
        "Wang and others",
        2025,
        "2505.07527",
    ),
    "spo": Paper("Single-stream Policy Optimization", "Xu and Ding", 2025, "2509.13232"),
    "grpo_lambda": Paper(
        "GRPO-λ: Credit Assignment improves LLM Reasoning", "Parthasarathi and others", 2025, "2510.00194"
    ),
    "mt_grpo": Paper(
        "Reinforcing Multi-Turn Reasoning in LLM Agents via Turn-Level Reward Design",
        "Zeng and others",
        2025,
        "2505.11821",
    ),
}
"""Papers by their key in a bibliography."""


class NamedMethod(NamedTuple):
    """A method as its paper calls it.

    Args:
        name: Name for readers.
        papers: Keys of `PAPERS`; the first one introduced it.
    """

    name: str
    papers: tuple[str, ...]


PRESET_METHODS: dict[str, NamedMethod] = {
    "grpo": NamedMethod("GRPO", ("grpo",)),
    "dr_grpo": NamedMethod("Dr. GRPO", ("dr_grpo",)),
    "dapo": NamedMethod("DAPO", ("dapo",)),
    "gspo": NamedMethod("GSPO", ("gspo",)),
    "gspo_token": NamedMethod("GSPO-token", ("gspo",)),
    "luspo": NamedMethod("LUSPO", ("luspo",)),
    "gmpo": NamedMethod("GMPO", ("gmpo",)),
    "cispo": NamedMethod("CISPO", ("cispo",)),
    "scale_rl": NamedMethod("ScaleRL", ("scale_rl", "cispo")),
    "sapo": NamedMethod("SAPO", ("sapo",)),
    "vespo": NamedMethod("VESPO", ("vespo",)),
    "gpg": NamedMethod("GPG", ("gpg",)),
    "gvpo": NamedMethod("GVPO", ("gvpo",)),
    "dppo": NamedMethod("DPPO", ("dppo",)),
    "fipo": NamedMethod("FIPO", ("fipo",)),
    "bapo": NamedMethod("BAPO", ("bapo",)),
    "cpgd": NamedMethod("CPGD", ("cpgd",)),
    "clip_cov": NamedMethod("Clip-Cov", ("entropy",)),
    "kl_cov": NamedMethod("KL-Cov", ("entropy",)),
    "rloo": NamedMethod("RLOO", ("rloo",)),
    "opo": NamedMethod("OPO", ("opo",)),
    "maxrl": NamedMethod("MaxRL", ("maxrl",)),
    "reinforce++": NamedMethod("REINFORCE++", ("reinforce++",)),
    "reinforce++_baseline": NamedMethod("REINFORCE++-baseline", ("reinforce++",)),
    "reinforce_rej": NamedMethod("Reinforce-Rej", ("reinforce_rej",)),
    "lite_ppo": NamedMethod("Lite PPO", ("lite_ppo",)),
    "pass_at_k": NamedMethod("Pass@k training", ("pass_at_k", "pkpo")),
    "krpo": NamedMethod("KRPO", ("krpo",)),
    "spo": NamedMethod("SPO", ("spo",)),
    "grpo_lambda": NamedMethod("GRPO-λ", ("grpo_lambda",)),
    "process_supervision": NamedMethod("GRPO with process supervision", ("grpo",)),
    "mt_grpo": NamedMethod("MT-GRPO", ("mt_grpo", "grpo")),
    "vpg": NamedMethod("REINFORCE with a learned baseline", ("reinforce",)),
}
"""Methods by the name of the preset, in `GRPOVariantConfig` or `PPOConfig`, that has their settings."""
