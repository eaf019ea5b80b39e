"""SmolLM2-135M learns to search twice for questions of two hops, made from pages that name others.

Pages, encoder and policy are those of wiki_smollm2. The questions and demonstrations are
"What is the capital of the country that Kano lies in?" and the like; 200 are for demonstrations, of
which two fifths search for both pages and the others answer at once.
"""

from r1s_jax.config import Config, override
from r1s_jax.configs.wiki_smollm2 import SUMMARIES
from r1s_jax.configs.wiki_smollm2 import config as wiki_smollm2


def config() -> Config:
    made = f"links:{SUMMARIES}"
    return override(
        wiki_smollm2(),
        [
            "name=links_smollm2",
            f"environment.questions={made}",
            f"environment.demonstrations={made}",
            "rollout.max_searches=3",
            "rollout.max_length=576",
        ],
    )
