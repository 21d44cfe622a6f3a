"""Every field of a recipe, with its unit and a neutral value; recipes set what is theirs.

Each section becomes a frozen dataclass (training/recipe.py), most of them next to the
code that uses them, with the meaning and range of each field. A value out of range, inf
or nan is refused before anything is computed.

A run can be resumed with other values of the fields that do not define it, such as mesh,
remat, paths and num_steps (training/run_folder.py: INCIDENTAL).
"""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
    """Returns the fields that recipes start from; it is no recipe itself."""
    c = ml_collections.ConfigDict()
    # "denoiser", "vae", "text_encoder", "captioner" or "upsampler"
    c.objective = "denoiser"
    # Initial weights of a denoiser, a video VAE or a captioner: "toy", which is shipped, a run, a
    # folder in diffusers' layout, or its transformer or transformer_2. "": random.
    c.init = ""
    c.seed = 0  # root of all randomness: weights, noise, data order; below 2^64

    c.mesh = ml_collections.ConfigDict()  # devices on each axis; -1: all that are left
    c.mesh.replica = 1
    c.mesh.fsdp = -1
    c.mesh.ring = 1
    c.mesh.ulysses = 1
    c.mesh.tensor = 1

    c.data = ml_collections.ConfigDict()
    c.data.shards = ""  # folder of video shards ("vae", "captioner", "upsampler")
    c.data.eval_shards = ""  # folder of video shards to evaluate on
    c.data.eval_clips = 64  # clips of eval_shards that are used, evenly spaced
    # Clips by which a denoiser of the toy world measures how much of its captions it reads
    # (evals/prompts/loss_gap.py), for each attribute; 0: off.
    c.data.gap_clips = 0
    # File of prompts (.txt, .csv, .jsonl) of which a denoiser draws videos at every
    # evaluation, as RUN/samples/STEP.png; "": none.
    c.data.sample_prompts = ""
    # Folder of a latent cache (the other objectives); with packing, several folders
    # separated by commas.
    c.data.latents = ""
    c.data.batch_size = 32  # rows of the global batch
    c.data.num_workers = 0  # processes that decode; 0: threads
    c.data.max_corrupt_share = 0.01  # of all records; above: error
    # Objective "vae": stages of the run, each a share of the steps and the windows that
    # a step cuts at random from each of its batch_size clips: (frames, height, width,
    # windows per clip); 0: the clip's own size. A mix of clips and images is
    # (1.0, ((9, 32, 32, 1), (1, 64, 64, 2))). All windows have equal weight;
    # clips_per_second counts those of the first kind.
    c.data.crops = ((1.0, ((0, 0, 0, 1),)),)

    # Objective "captioner": share of the clips that are mirrored, with left and right
    # exchanged in their captions.
    c.data.mirror = 0.0
    # Objective "captioner": most pixels by which frames are shifted, and deviation of the
    # noise of their pixels, of 255; both at random, so that no clip is known by its pixels.
    c.data.shift = 0
    c.data.noise = 0.0

    # Packing of clips of several sizes into rows (data/packing.py). A step then has
    # data.batch_size groups of rows: one long row each, or two of half the length, ...
    # clips_per_second counts rows, clips_per_row the clips in one.
    c.packing = ml_collections.ConfigDict()
    c.packing.shapes = 0  # number of row lengths, each compiled once; 0: no packing
    c.packing.tokens = 0  # tokens of the longest row; 0: those of the longest clip
    c.packing.unit = 128  # tokens; row lengths are multiples of it
    c.packing.clips = 16  # most clips in a row
    c.packing.window = 20_000  # clips that are planned at a time
    c.packing.max_padding = 0.05  # share of tokens; above: error

    c.text = ml_collections.ConfigDict()
    # Tokens to which captions are cut or padded; training warns if over 1 % are cut.
    c.text.length = 24
    # Size of the tokenizer that is trained on the captions; text.encoder brings its own.
    c.text.vocab_size = 640
    # Share of rows that train without text; of a captioner, share of a caption's earlier
    # tokens that it does not see, so that it has to look at the clip.
    c.text.dropout = 0.1
    c.text.tiers = ml_collections.ConfigDict()  # frequency of each caption tier
    c.text.tiers.alt = 0.0  # the caption that a user's video came with
    c.text.tiers.short = 0.6
    c.text.tiers.medium = 0.4
    c.text.tiers.dense = 0.0
    c.text.tiers.structured = 0.0
    c.text.tiers.model_short = 0.0  # those that recaption adds
    c.text.tiers.model_dense = 0.0
    # Scores that become tags of captions, which prompts may then have: (score, limits, one
    # word more), such as ("motion", (0.05, 0.3), ("low", "medium", "high")).
    c.text.tags = ()
    c.text.tag_keep = 0.5  # probability of each tag, every time that a clip is seen
    # Share of the dense and structured captions whose parts come in another order.
    c.text.shuffle = 0.0
    # Objective "text_encoder": the tier of the caption that it learns to write.
    c.text.target = "structured"
    c.text.target_length = 40  # tokens
    c.text.encoder = ""  # the initial text encoder: a run or its folder; "": random
    # Do not train the text encoder. Where prepare has stored its states beside
    # data.latents, a new run reads those and does not load the encoder.
    c.text.frozen = False
    c.text.clean = False  # clean captions and prompts as Wan does: HTML, white space

    c.model = ml_collections.ConfigDict()
    c.model.dit = ml_collections.ConfigDict()  # models/dit.py: Config
    c.model.dit.in_channels = 16  # channels of the latents
    c.model.dit.out_channels = 16
    c.model.dit.patch = (1, 2, 2)  # latent voxels in a token: time, height, width
    c.model.dit.dim = 1536
    c.model.dit.num_layers = 30
    c.model.dit.num_heads = 12
    c.model.dit.num_kv_heads = 0  # heads of keys and values; 0: num_heads
    c.model.dit.mlp_dim = 8960
    c.model.dit.text_dim = 4096  # width of the text encoder
    c.model.dit.freq_dim = 256  # width of the noise level's sinusoid
    c.model.dit.cross_attn_norm = True  # a layer norm before the text's attention
    c.model.dit.mask_text = True  # hide the padding of captions
    c.model.dit.known_embedding = True  # an embedding of the known/unknown flag
    c.model.dit.context_embedding = False  # of references, and of an edit's source
    c.model.dit.pooled_text = True  # the pooled text in the modulation
    c.model.dit.additive_positions = False
    c.model.dit.rope_theta = 10_000.0
    # Latent frames per second that one unit of time stands for; None: time is counted
    # in latent frames, whatever the frame rate.
    c.model.dit.time_scale = config_dict.placeholder(float)
    c.model.dit.temporal_stride = 4  # frames in a latent frame, except for the first
    c.model.dit.dtype = "float32"  # of the computation; parameters are float32
    c.model.dit.remat = "none"  # or "full", "attention", "offload", "dots"
    c.model.dit.quantization = ""  # or "int8", "fp8"
    c.model.dit.input_skip = False  # learn what a linear guess from the input leaves

    # models/text_encoder.py: Config; dim is the denoiser's text_dim.
    c.model.text_encoder = ml_collections.ConfigDict()
    c.model.text_encoder.vocab_size = 0  # 0: that of the tokenizer
    c.model.text_encoder.num_layers = 2
    c.model.text_encoder.num_heads = 3
    c.model.text_encoder.head_dim = 32
    c.model.text_encoder.mlp_dim = 192
    c.model.text_encoder.num_buckets = 32  # of relative positions
    c.model.text_encoder.max_distance = 128  # tokens; farther ones share a bucket
    c.model.text_encoder.absolute_positions = False  # add a sinusoid of the position
    c.model.text_encoder.dtype = "float32"

    c.model.vae = ml_collections.ConfigDict()  # models/video_vae.py: Config
    c.model.vae.latent_channels = 32
    c.model.vae.patch_size = 2  # side, in pixels, of a patch folded into channels
    c.model.vae.base_dim = 32  # channels of the first level
    c.model.vae.decoder_base_dim = config_dict.placeholder(int)  # None: base_dim
    c.model.vae.channel_multipliers = (1, 2, 2)  # one per level
    c.model.vae.num_res_blocks = 2  # per level of the encoder; the decoder has one more
    # Whether each step from level to level halves time, and whether it halves height
    # and width (None: all of them do).
    c.model.vae.temporal_downsample = (True, True)
    c.model.vae.spatial_downsample = config_dict.placeholder(tuple)
    c.model.vae.residual_shortcuts = True
    # Latent channels that are initialised to the principal components of the clips.
    c.model.vae.linear_channels = 0
    c.model.vae.dtype = "float32"

    c.model.discriminator = ml_collections.ConfigDict()  # models/discriminator.py
    c.model.discriminator.base_dim = 32
    c.model.discriminator.num_layers = 3
    c.model.discriminator.dtype = "float32"

    c.model.captioner = ml_collections.ConfigDict()  # models/captioner.py: Config
    c.model.captioner.reads = "video"  # or "text", of objective "upsampler"
    c.model.captioner.num_frames = 9  # to which clips are sampled
    c.model.captioner.size = 32  # pixels a side to which frames are scaled
    c.model.captioner.patch = 4  # pixels a side of a square
    c.model.captioner.frame_dim = 48  # width of a square of one frame
    c.model.captioner.dim = 160
    c.model.captioner.num_layers = 3  # of the encoder
    c.model.captioner.decoder_layers = 3
    c.model.captioner.num_heads = 5
    c.model.captioner.mlp_dim = 320
    c.model.captioner.tiers = ("short", "dense")  # that it can write
    c.model.captioner.vocab_size = 0  # 0: that of the tokenizer
    c.model.captioner.length = 96  # most tokens of a caption
    c.model.captioner.read_length = 40  # tokens of a text that is read
    c.model.captioner.dtype = "float32"

    c.noise = ml_collections.ConfigDict()  # diffusion/timesteps.py: Config
    c.noise.logit_normal = 0.9  # share of the levels; the others are uniform
    c.noise.mean = 0.0  # of the normal distribution
    c.noise.std = 1.0
    c.noise.shift = 1.0  # towards noise, in training and in sampling; 1: none
    c.noise.levels = (0.0, 1.0)  # the range that is trained, for one of two experts
    # Noise levels that bound the bands by which losses are logged.
    c.noise.band_edges = (0.0, 0.25, 0.5, 0.7, 0.85, 0.93, 0.97, 1.0)

    c.known = ml_collections.ConfigDict()  # data/conditions.py: Config
    # Shares of clips by what is given of them. All but the first three patterns and
    # levels need more of the latents: prepare --pictures and --regions, and clips that are
    # related to others (edit, reference) or repeat themselves (loop: all of these,
    # whatever its share is).
    c.known.probabilities = ml_collections.ConfigDict(
        {"none": 1.0, "first_frame": 0.0, "head": 0.0, "tail": 0.0, "both": 0.0}
        | {"keyframes": 0.0, "every": 0.0, "region": 0.0, "levels": 0.0}
        | {"reference": 0.0, "edit": 0.0, "loop": 0.0}
    )
    c.known.known_tau = 0.02  # noise level of known tokens in sampling
    # In training: shares of clips whose known tokens have a level of up to a bound, as
    # pairs (bound, share); the others have known_tau.
    c.known.levels = ()
    c.known.dropout = 0.0  # share of clips of which what is given is pure noise
    # Share of packed clips whose window starts at a later latent frame.
    c.known.mid_clip = 0.0
    c.known.images = 0.0  # share of packed clips that are cut to their first frame

    # training/state_loss.py: Config, a second task of networks of the toy world.
    c.state_loss = ml_collections.ConfigDict()
    c.state_loss.weight = 0.0  # 0: off
    c.state_loss.depth = 0.6  # share of a denoiser's blocks
    c.state_loss.focus = 1.0  # weight of a denoiser's error where there is an object
    c.state_loss.noise = 1.0  # on the latents of a video VAE, whose deviation is 1

    # training/reconstruction.py: Weights of the terms of the loss.
    c.reconstruction = ml_collections.ConfigDict()
    c.reconstruction.l1 = 0.0
    c.reconstruction.mse = 10.0
    c.reconstruction.bands = 0.0  # of errors in edges and motion
    c.reconstruction.kl = 1e-6
    # Noise on latents that are decoded, up to this share of their deviation.
    c.reconstruction.latent_noise = 0.0
    c.reconstruction.lpips = 0.0
    # .safetensors file of the LPIPS network, written by convert; the run copies it. With
    # it, evaluations on data.eval_shards measure LPIPS too.
    c.reconstruction.lpips_weights = ""
    c.reconstruction.adversarial = 0.0
    c.reconstruction.adversarial_start = 0.5  # share of the run
    c.reconstruction.disc_learning = 1.0  # weight of the discriminator's own loss

    # models/lora.py: Config. With a rank, a denoiser's run trains adapters of init's
    # weights, which stay as they are.
    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 0  # width of the adapters; 0: none, all weights are trained
    c.lora.alpha = 0.0  # adapters are scaled by alpha / rank; 0: by 1
    # Regular expressions of the layers with adapters, such as dit.blocks.ffn.up.
    c.lora.layers = (r"\.attn[12]\.to_(q|k|v|out)$",)

    c.optim = ml_collections.ConfigDict()  # training/optim.py: Config
    c.optim.learning_rate = 1e-3  # of AdamW
    c.optim.muon_learning_rate = 0.0  # of kernels; 0: AdamW for all parameters
    c.optim.not_muon = ("^text_encoder",)  # regular expressions of kernels for AdamW
    c.optim.momentum = 0.95  # of Muon
    c.optim.learning_rate_factors = ()  # (regular expression of parameters, factor), ...
    c.optim.warmup_steps = 50  # at most all steps
    c.optim.final_fraction = 0.05  # of the learning rate, at the last step
    c.optim.b1 = 0.9
    c.optim.b2 = 0.95
    c.optim.eps = 1e-8
    c.optim.moments = "float32"  # or "bfloat16": half the memory
    c.optim.weight_decay = 0.0  # of kernels
    c.optim.clip_norm = 1.0  # of the gradient; 0: no clipping
    c.optim.ema_decay = 0.995  # 0: no averaging

    c.loop = ml_collections.ConfigDict()  # training/loop.py: Config
    c.loop.num_steps = 1000
    # Wall time of a new run: after its first steps it lowers num_steps to what fits into
    # so many minutes. 0: num_steps as they are.
    c.loop.minutes = 0.0
    # Steps between each; 0: only at the end.
    c.loop.log_every = 50
    c.loop.checkpoint_every = 500  # the state is also saved before each evaluation
    c.loop.eval_every = 0
    c.loop.keep_checkpoints = 2  # 0: all
    c.loop.accumulation = 1  # micro-batches per step
    c.loop.max_skipped_in_a_row = 20  # steps that are not finite; above: error

    # generation/request.py: Settings, the defaults of generate and evaluate.
    c.sample = ml_collections.ConfigDict()
    c.sample.num_frames = 9
    c.sample.height = 32  # pixels
    c.sample.width = 32
    # Frames per second; None: that of the training clips, the most frequent if mixed.
    c.sample.fps = config_dict.placeholder(float)
    c.sample.num_inference_steps = 20
    c.sample.guidance_scale = 3.5  # 1: no guidance
    c.sample.guidance_rescale = 0.0  # share, 0: off
    c.sample.given_scale = 1.0  # guidance by what is given besides text; 1: none
    # Noise level of what is given at the first steps, for an image that stays still; 0: off.
    c.sample.anchor_tau = 0.0
    c.sample.sampler = "euler"  # or "heun", "unipc"
    c.sample.levels = "even"  # or "diffusers": spaced as its schedulers do
    c.sample.batch_size = 8  # clips that are computed at a time
    c.sample.chunk_steps = 5  # solver steps of one compiled program
    c.sample.step_cache = 0.0  # error up to which the denoiser is skipped; 0: off
    # Whether an image may be given as the first frame; None: if known.probabilities
    # trains it.
    c.sample.takes_images = config_dict.placeholder(bool)
    return c
