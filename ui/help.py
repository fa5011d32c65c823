"""The words of the workbench, each explained in a sentence; every `info=` text comes from here."""

from __future__ import annotations

__all__ = ["GUIDE", "WORDS", "guide", "help_for"]

WORDS: dict[str, str] = {
    "model": (
        "The language model to work on. Pick one, or type a folder or a Hugging Face owner/name."
    ),
    "contrast set": (
        "Prompts that each have two replies, one with the behaviour you want and one without; "
        "the difference between them is the direction."
    ),
    "vector name": (
        "What the steering vector will be called. Lower-case letters, digits, '.', '_', '-'."
    ),
    "method": (
        "How the direction is read off. The mean difference is the plain choice; "
        "the others are for comparison."
    ),
    "position": "Which tokens of a reply are read. The mean over the whole reply is the steadiest.",
    "read in": (
        "Where the pairs are read: by a copy of the model that is loaded for this, or in the engine, "
        "which serves the model already; that saves memory."
    ),
    "colour": (
        "Shows, while a reply is written, how far each of its tokens lies along the vector: orange towards "
        "the behaviour, blue away from it, in the unit of the dose."
    ),
    "steering vector": (
        "A direction inside the model; adding it while the model writes moves the behaviour."
    ),
    "dose": (
        "How strongly to steer, as a share of the model's own signal. 0 is none, a negative dose "
        "is the opposite behaviour, and too much breaks the text."
    ),
    "block": (
        "The layer where the vector is added. 'best' is the one found at extraction; "
        "or write a number, or a range such as 10-14."
    ),
    "phase": (
        "When to steer: while the prompt is read, while the reply is written (decode), or "
        "both (all)."
    ),
    "further terms": (
        "More vectors to add, for example formal=-0.1 or brief=0.2:15/decode, joined by commas."
    ),
    "with": (
        "Trained weights to answer with, for example cheerful-baked=1. Empty is the untrained "
        "model."
    ),
    "with as": (
        "Swapping puts the exact weights in, and others wait meanwhile. A LoRA has only the low-rank "
        "part of the change, but each request brings its own, so that several personalities answer "
        "at once; what it loses stands under the reply. The engine needs slots for it: "
        "'workbench serve --lora-slots 4'."
    ),
    "lora rank": "Higher keeps more of the change and costs more; the receipt says how much is lost.",
    "message": "Both columns answer it, on the same seed. Shift and return send it.",
    "plain chat": "The model's own replies appear here.",
    "steered chat": (
        "The steered replies appear here. The receipt under them is the engine's own count of the "
        "positions that it steered; the weights are named by a digest."
    ),
    "live prompt": "Base and steered answer together; trained follows when its weights are loaded.",
    "system prompt": "An instruction that comes before the chat. Empty is none.",
    "temperature": "0 always takes the likeliest token; higher is more varied.",
    "seed": "The same seed and settings give the same text.",
    "max tokens": "Where a reply is cut off; a token is about three quarters of a word.",
    "controls": (
        "Random directions of the same strength that the vector has to beat. "
        "19 is the fewest that can pass."
    ),
    "doses": "The doses to measure, joined by commas. Empty measures the standard range.",
    "task name": "What the trained change of weights (the task vector) will be called.",
    "train dose": (
        "The dose that the weights learn to reproduce. Empty is the working dose of the verdict."
    ),
    "own data": (
        "Teach the weights conversations of your own, an instruction that is then no longer needed, "
        "or one side of a contrast set."
    ),
    "learnt": (
        "A chat file, JSONL with a conversation a line, is learnt as it is written; instructions are "
        "followed by the base and learnt without them; of a contrast set one side is preferred."
    ),
    "instructions": (
        "What the base is told before it answers ordinary prompts. A file with a prompt and its "
        "instructions on each line stands in for this text."
    ),
    "side": "The replies of the set that become likelier.",
    "learn prompts": "How many prompts are answered under written instructions to make the lesson.",
    "optimizer": "APOLLO keeps little memory beside the weights; the others are for comparison.",
    "targets": (
        "What is learnt: the steered model's whole probability for each token (soft), "
        "or only the token it chose (tokens)."
    ),
    "replay": "Share of ordinary text mixed in, so that nothing else is forgotten.",
    "learning rate": "The size of a step. Larger learns faster and damages more.",
    "prompts": "How many prompts the steered model answers to make the lesson.",
    "read pairs": (
        "How the steered model reads both sides of the training pairs is learnt as well. Without it "
        "the weights learn what to say, and hardly what to leave unsaid."
    ),
    "passes": "How often the lesson is gone through.",
    "tokens": "The length of each lesson reply, in tokens.",
    "tier": (
        "How far back a decision's gradient goes. A frozen context costs least, and longer ones all "
        "the less."
    ),
    "reuse": (
        "A frozen context may be read once and used in many steps; it is read again so often "
        "that it is stale by about 5 % at most."
    ),
    "keep": "Which step's weights become the result; the last are called by its name and -last.",
    "rank": "Of APOLLO's view of each gradient. Less takes less memory.",
    "batch": "Decisions of one step; ordinary text comes on top.",
    "held_out_every": "What is never learnt is measured so often.",
    "patience": (
        "Measurements in a row without improvement after which training stops; 0 goes to the end."
    ),
    "recompute": "Less memory, slower.",
    "recorded": "On a GPU, steps of a few shapes are recorded and replayed: faster where there are many.",
    "compare prompts": "One prompt a line; each is answered by all three.",
    "compare dose": (
        "The dose of the steered column. Empty is the dose that the task was trained at."
    ),
    "task vector": (
        "The exact change of the weights that training made; it can be scaled, negated and removed."
    ),
    "ingredients": (
        "Task vectors, or recipes that add them up. Each gets a slider: 1 is as trained, 0.5 half of "
        "it, -1 the opposite, and 0 leaves it out."
    ),
    "merge method": "How the task vectors become one. Linear adds them up, and fits most needs.",
    "recipe name": "What the recipe will be called. A name in use gets another revision.",
    "searched": (
        "What is searched: a recipe by its own method, or task vectors, which are added up. A weight "
        "may be typed, as in formal-baked=-0.5."
    ),
    "behaviours": (
        "The contrast sets whose held-out pairs judge. How much one counts may be typed, as in "
        "formal=0.5."
    ),
    "way": "Whether all task vectors share one coefficient, or each has one of its own.",
    "coefficients": (
        "What the weights are multiplied by, joined by commas: 0 leaves out, 1 is as trained, -1 is "
        "the opposite. Empty measures the standard range."
    ),
    "ranges": (
        "One task vector a line, a colon, and its coefficients. The others take those above. For "
        "ways with more than one coefficient."
    ),
    "held-out pairs": (
        "How many held-out pairs of each behaviour are read. Fewer are quicker and less sure; at "
        "least 4, and empty is all of them."
    ),
    "budget": (
        "By how much the loss on ordinary text may rise, in nats a token. What is beyond is "
        "measured and not chosen."
    ),
    "good entry": "As it was before: the base, a name, or a revision such as cheerful-baked@3.",
    "bad entry": "As it is now: a name, or a revision such as cheerful-baked@9.",
    "telling behaviour": (
        "The contrast set whose margin tells good from bad, or the loss on general text."
    ),
    "threshold": "The number that lies between good and bad, in nats. Empty is half way.",
    "over": (
        "Two revisions of one name have a history between them; two recipes differ in ingredients."
    ),
    "own name": "The set is kept under this name, for you alone, in the library's folder.",
    "sides": (
        "Whether the two columns are replies, or system instructions under which the model replies."
    ),
}

GUIDE: dict[str, str] = {
    "Extract": (
        "Read a direction off pairs of texts. The held-out pairs are never used to find the "
        "direction, only to check it."
    ),
    "Steer": (
        "Talk to the model with and without the direction, at the same time and on the same seed."
    ),
    "Verify": (
        "Measure whether the direction does what it should, and nothing else. "
        "The margin is how much likelier the wanted reply is than the unwanted one, in nats; "
        "KL is how far other text is changed."
    ),
    "Train": (
        "Teach the weights to do by themselves what the direction does. "
        "Recovered is the share of the steered change that the trained weights show on their own."
    ),
    "Compare": "The untrained model, the steered one and the trained one on the same prompts.",
    "Library": (
        "Everything that was kept. Each entry has a history, so that nothing is lost "
        "when a name is used again or deleted."
    ),
}


def help_for(word: str) -> str:
    """The sentence that explains `word`."""
    return WORDS[word]


def guide(tab: str) -> str:
    """The sentence at the head of a tab."""
    return GUIDE[tab]
