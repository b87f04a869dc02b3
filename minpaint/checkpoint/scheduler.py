"""scheduler_config.json: the noise schedule of a checkpoint, and what it asks of the sampler that is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minpaint.checkpoint.rows import ANY, WIDTH, Json, Row, check, choice, count, flag, number, read_rows
from minpaint.errors import CheckpointError
from minpaint.schedule import SchedulerConfig

SCHEDULER = "scheduler/scheduler_config.json"
# The noise schedule, which counts whatever the sampler. The reference's classes share these defaults; SD's own files
# state all of them. A file without `steps_offset` or `skip_prk_steps` gets what the reference's pipeline puts there,
# 1 and true (pipeline_stable_diffusion_inpaint.py, __init__); a value that the file states is kept.
NOISE_FIELDS = {
    "train_steps": count("num_train_timesteps", 1000, most=2 * WIDTH),
    "beta_start": number("beta_start", 0.0001, limit=1),
    "beta_end": number("beta_end", 0.02, limit=1),
    "beta_schedule": choice("beta_schedule", "linear", "linear", "scaled_linear"),
    "prediction": choice("prediction_type", "epsilon", "epsilon", "v_prediction"),
    "steps_offset": count("steps_offset", 1, least=0),
    "spacing": choice("timestep_spacing", None, "leading", "trailing", "linspace"),
    "zero_terminal_snr": flag("rescale_betas_zero_snr", False),
}
NOISE_FIXED: Json = {"trained_betas": None}
CLIP = {"clip_sample": flag("clip_sample", None), "clip_sample_range": number("clip_sample_range", 1.0)}
END = {"set_alpha_to_one": flag("set_alpha_to_one", None)}
# What each sampler reads besides (diffusers/schedulers/scheduling_{ddim,pndm,dpmsolver_multistep,lcm}.py, __init__).
SAMPLER_FIELDS: dict[str, dict[str, Row]] = {
    "ddim": {**CLIP, **END},
    "pndm": {"skip_prk_steps": flag("skip_prk_steps", True), **END},
    "dpmpp": {"use_karras_sigmas": flag("use_karras_sigmas", False)},
    "lcm": {"original_steps": count("original_inference_steps", 50), **CLIP},
}
# dynamic thresholding belongs to models of pixels; what it is set to, and two that a final sigma of zero decides
# already, change nothing
THRESHOLDING: Json = {"thresholding": False, **dict.fromkeys(("dynamic_thresholding_ratio", "sample_max_value"), ANY)}
OTHER_SIGMAS = ("use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")
SAMPLER_FIXED: dict[str, Json] = {
    "ddim": THRESHOLDING,
    "pndm": {},
    "dpmpp": {
        **THRESHOLDING,
        **dict.fromkeys(OTHER_SIGMAS, False),
        **dict.fromkeys(("flow_shift", "time_shift_type", "lower_order_final", "euler_at_final", "variance_type"), ANY),
        "lambda_min_clipped": float("-inf"),
    },
    "lcm": {**THRESHOLDING, "timestep_scaling": 10.0},
}
# Settings of dpmpp: the value that is ours, and others of the reference, to which ours comes nearest.
SOLVER: Mapping[str, tuple[Any, ...]] = {
    "solver_order": (2, 1, 3),
    "solver_type": ("midpoint", "heun", "logrho", "bh1", "bh2"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver", "deis"),
    "final_sigmas_type": ("zero", "sigma_min"),
}
# The noise schedule's, and what official files say for ddim and pndm whichever class they name: no line is due.
QUIET = {*NOISE_FIXED, *(key for rows in (NOISE_FIELDS, CLIP, END) for key, *_ in rows.values()), "skip_prk_steps"}
SAMPLER_OF_CLASS = {
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "DPMSolverMultistepScheduler": "dpmpp",
    "LCMScheduler": "lcm",
    "FlaxDDIMScheduler": "ddim",
    "FlaxPNDMScheduler": "pndm",
}
ANCESTRAL = (  # these add noise at every step, as ddim does with eta 1
    *("EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "DDPMScheduler"),
)
NEAREST = {  # the sampler that comes nearest to a class that is none of ours
    **dict.fromkeys(("DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSinglestepScheduler"), "dpmpp"),
    **dict.fromkeys(("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"), "ddim"),
    **dict.fromkeys(("KDPM2DiscreteScheduler", *ANCESTRAL), "ddim"),
}


def scheduler_config(source: Json) -> SchedulerConfig:
    """SchedulerConfig from the reference's JSON; CheckpointError names an unsupported key of the noise schedule.

    What it asks of a sampler is judged for each sampler by itself, and has to be accepted by the one that is used only.
    """
    class_name = source.get("_class_name")
    if not isinstance(class_name, str):
        raise CheckpointError(f"{SCHEDULER}: _class_name is missing; fetch the file again")
    values = read_rows(SCHEDULER, source, NOISE_FIELDS, NOISE_FIXED, others=True)
    if values["zero_terminal_snr"]:
        fits = values["prediction"] == "v_prediction"  # at a signal of 0, eps says nothing about x0
        check(fits, SCHEDULER, "rescale_betas_zero_snr", True, "only with v_prediction")
    refused, ignored = {}, {}
    for sampler, rows in SAMPLER_FIELDS.items():
        fixed = SAMPLER_FIXED[sampler]
        values |= read_rows(SCHEDULER, source, rows, {}, others=True)
        try:
            read_rows(SCHEDULER, source, {}, fixed, others=True)
            for key, known in SOLVER.items() if sampler == "dpmpp" else ():
                check(source.get(key) in (None, *known), SCHEDULER, key, source.get(key), f"only {known}")
        except CheckpointError as error:
            refused[sampler] = str(error)
        read = {*QUIET, *fixed, *(key for key, *_ in rows.values())}
        left = {key: value for key, value in source.items() if not (key in read or key.startswith("_") or not value)}
        if sampler == "dpmpp":
            left = {key: value for key, value in left.items() if value != SOLVER.get(key, ((),))[0]}
        if left:
            ignored[sampler] = ", ".join(f"{key} {value!r}" for key, value in left.items())
    named = (SAMPLER_OF_CLASS | NEAREST).get(class_name)
    eta = float(class_name in ANCESTRAL)
    return SchedulerConfig(class_name, named, class_name in SAMPLER_OF_CLASS, eta, refused, ignored, **values)
