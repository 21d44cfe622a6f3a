"""Every field once, with its unit; recipes copy this and change what they need.

The sections become frozen dataclasses (training/recipe.py), most of them in the code
that uses them, where the meaning and the range of each field are given. A number out of
range is refused before anything is computed, and so are inf and nan.

A run that has begun may go on with other values of the fields that do not define it:
mesh, remat, paths, num_steps and the like (training/run_folder.py: INCIDENTAL).
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the config of the toy denoiser; see configs/toy.py."""
    c = ml_collections.ConfigDict()
    c.objective = "denoiser"  # "denoiser", "vae" or "text_encoder"
    # A denoiser's weights to begin with: a run, a folder in diffusers' layout, or its
    # transformer or transformer_2. "": random ones.
    c.init = ""
    c.seed = 0  # root of all randomness: weights, noise, data order; below 2^64

    c.mesh = ml_collections.ConfigDict()  # devices on each axis; -1: what is left
    c.mesh.replica = 1
    c.mesh.fsdp = -1
    c.mesh.ring = 1
    c.mesh.ulysses = 1
    c.mesh.tensor = 1

    c.data = ml_collections.ConfigDict()
    c.data.shards = ""  # folder of video shards (objective "vae")
    c.data.eval_shards = ""  # the same, for what is measured at loop.eval_every
    c.data.eval_clips = 64  # of them, spread over all
    # Folder of a latent cache (the other objectives); a denoiser whose rows are packed
    # takes several, with commas between.
    c.data.latents = ""
    c.data.batch_size = 32  # rows of the global batch
    c.data.num_workers = 0  # processes that decode; 0: threads
    c.data.max_corrupt_share = 0.01  # of all records, damaged; above: error
    # Objective "vae": stages of the run, each a share of its steps and the kinds of
    # windows that every step has: (frames, height, width, windows a clip), cut anywhere
    # out of each of the batch_size clips; 0: the clip's own. So a mix of clips and
    # images is (1.0, ((9, 32, 32, 1), (1, 64, 64, 2))). Every window weighs the same;
    # clips_per_second counts those of the first kind.
    c.data.crops = ((1.0, ((0, 0, 0, 1),)),)

    # Denoisers of clips of many sizes, which share rows (data/packing.py). A step then
    # has data.batch_size groups of rows: one long row each, or two of half the length...
    # clips_per_second then counts rows, clips_per_row what they hold.
    c.packing = ml_collections.ConfigDict()
    c.packing.shapes = 0  # lengths of rows, each compiled once; 0: clips of one size
    c.packing.tokens = 0  # of the longest row; 0: those of the longest clip
    c.packing.unit = 128  # that rows' lengths are multiples of
    c.packing.clips = 16  # the most that share a row
    c.packing.window = 20_000  # clips that are planned at a time
    c.packing.max_padding = 0.05  # share of tokens; above: error

    c.text = ml_collections.ConfigDict()
    # Tokens a caption is cut or padded to; training says where more than 1 % are cut.
    c.text.length = 24
    # Pieces of the tokenizer trained on the captions; that of text.encoder has its own.
    c.text.vocab_size = 640
    c.text.dropout = 0.1  # share of rows that train without text
    c.text.tiers = ml_collections.ConfigDict()  # how often which caption is taken
    c.text.tiers.alt = 0.0  # what videos of one's own come with
    c.text.tiers.short = 0.6
    c.text.tiers.medium = 0.4
    c.text.tiers.dense = 0.0
    c.text.tiers.structured = 0.0
    # Objective "text_encoder": the caption that is written when one of `tiers` is read.
    c.text.target = "structured"
    c.text.target_length = 40  # tokens
    c.text.encoder = ""  # run folder of a text encoder to begin with; "": random
    # Keep the text encoder as it is, not train it along. Where prepare has stored its
    # states beside data.latents, a new run reads those and does not hold the encoder.
    c.text.frozen = False
    c.text.clean = False  # captions and prompts as Wan cleans them: HTML, white space

    c.model = ml_collections.ConfigDict()
    c.model.dit = ml_collections.ConfigDict()  # models/dit.py: Config
    c.model.dit.in_channels = 24
    c.model.dit.out_channels = 24
    c.model.dit.patch = (1, 2, 2)
    c.model.dit.dim = 160
    c.model.dit.num_layers = 5
    c.model.dit.num_heads = 5
    c.model.dit.num_kv_heads = 0  # 0: as many as num_heads
    c.model.dit.mlp_dim = 640
    c.model.dit.text_dim = 96
    c.model.dit.freq_dim = 128
    c.model.dit.mask_text = True
    c.model.dit.known_embedding = True
    c.model.dit.pooled_text = True
    c.model.dit.additive_positions = True
    c.model.dit.rope_theta = 100.0  # of a grid of a few tokens a side
    c.model.dit.time_scale = 2.0  # latent frames a second that one unit stands for
    c.model.dit.dtype = "float32"
    c.model.dit.remat = "dots"
    c.model.dit.quantization = ""  # or "int8", "fp8"
    c.model.dit.input_skip = True

    # models/text_encoder.py: Config; dim comes from the denoiser's text_dim.
    c.model.text_encoder = ml_collections.ConfigDict()
    c.model.text_encoder.vocab_size = 0  # 0: as many as the tokenizer has pieces
    c.model.text_encoder.num_layers = 2
    c.model.text_encoder.num_heads = 3
    c.model.text_encoder.head_dim = 32
    c.model.text_encoder.mlp_dim = 192
    c.model.text_encoder.absolute_positions = True
    c.model.text_encoder.dtype = "float32"

    c.model.vae = ml_collections.ConfigDict()  # models/video_vae.py: Config
    c.model.vae.latent_channels = 24
    c.model.vae.patch_size = 4  # pixels a side folded into channels
    c.model.vae.base_dim = 64
    c.model.vae.channel_multipliers = (1, 1, 1)
    c.model.vae.num_res_blocks = 1
    c.model.vae.temporal_downsample = (True, True)
    # Folding is all that space is compressed by: a doubling of height and width repeats
    # voxels, and what is inside of a block must then be learned from its neighbours,
    # which takes several times as long as this recipe has.
    c.model.vae.spatial_downsample = (False, False)
    c.model.vae.residual_shortcuts = True
    # Latent channels that begin at the principal components of the clips.
    c.model.vae.linear_channels = 0
    c.model.vae.dtype = "float32"

    c.model.discriminator = ml_collections.ConfigDict()  # models/discriminator.py
    c.model.discriminator.base_dim = 32
    c.model.discriminator.num_layers = 3
    c.model.discriminator.dtype = "float32"

    c.noise = ml_collections.ConfigDict()  # diffusion/timesteps.py: Config
    c.noise.logit_normal = 0.9
    c.noise.mean = 0.0
    c.noise.std = 1.0
    c.noise.shift = 12.0
    c.noise.levels = (0.0, 1.0)  # none outside is trained: for one of two experts

    c.known = ml_collections.ConfigDict()  # diffusion/known.py: Config
    c.known.probabilities = ml_collections.ConfigDict({"none": 0.9, "first_frame": 0.1})
    c.known.known_tau = 0.02

    c.reconstruction = ml_collections.ConfigDict()  # training/reconstruction.py
    c.reconstruction.l1 = 0.0
    c.reconstruction.mse = 10.0
    c.reconstruction.bands = 0.0
    c.reconstruction.kl = 1e-6
    c.reconstruction.lpips = 0.0
    # The .safetensors file of LPIPS's network, which convert makes and the run copies;
    # where it is given, what is measured on data.eval_shards has LPIPS as well.
    c.reconstruction.lpips_weights = ""
    c.reconstruction.adversarial = 0.0
    c.reconstruction.adversarial_start = 0.5

    c.optim = ml_collections.ConfigDict()  # training/optim.py: Config
    c.optim.learning_rate = 3e-3
    c.optim.muon_learning_rate = 0.02
    c.optim.not_muon = ("^text_encoder",)
    c.optim.momentum = 0.95
    # A text encoder that was trained before (text.encoder) knows what words mean; a
    # random one needs the full rate: ().
    c.optim.learning_rate_factors = (("^text_encoder", 0.1),)
    c.optim.warmup_steps = 50  # at most all of them
    c.optim.final_fraction = 0.05
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.moments = "float32"  # or "bfloat16": half the memory
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0  # 0: no clipping
    c.optim.ema_decay = 0.998

    c.loop = ml_collections.ConfigDict()  # training/loop.py: Config
    c.loop.num_steps = 4400
    # Steps between each; 0: only at the end.
    c.loop.log_every = 50
    c.loop.checkpoint_every = 500  # the state is also saved before each evaluation
    c.loop.eval_every = 0
    c.loop.keep_checkpoints = 2  # 0: all
    c.loop.accumulation = 1
    c.loop.max_skipped_in_a_row = 20

    c.sample = ml_collections.ConfigDict()  # defaults of generate and evaluate
    c.sample.num_frames = 9
    c.sample.height = 32  # pixels
    c.sample.width = 32
    # None: that of the clips it is trained on, of most of them where rates are mixed.
    c.sample.fps = config_dict.placeholder(float)
    c.sample.num_inference_steps = 20
    c.sample.guidance_scale = 3.5
    c.sample.sampler = "euler"
    c.sample.levels = "even"  # or "diffusers": as its schedulers place them
    # Whether a picture may be given as the first frame; None: where known.probabilities
    # trains it.
    c.sample.takes_images = config_dict.placeholder(bool)
    return c
