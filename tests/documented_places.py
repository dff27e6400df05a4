"""Where each documented command is run: as it stands, in small, by another test, or as far as it is read."""

from documented import Step

# A training of a second, in place of one of days.
SMALL = ("distributed.ranks=1", "steps=2", "global_batch_size=4", "optim.warmup_steps=1", "checkpoint.every_steps=1")
RANDOM = ("vision.model=small.json", "vision.weights=random", "text.model=small.json", "text.weights=random")
ON_CPU = (*RANDOM, *SMALL, "distributed.device=cpu", "vision.image_size=32")
PAIRS = (("s3://bucket/cc", "pairs"), ("/shared/", "shared/"))

PHOTOGRAPHS = (
    Step(
        "python data_prep/pack.py --config configs/data/photos.yaml images=photos/images "
        "captions=photos/train.csv output=data/photos/train"
    ),
    Step(
        "python data_prep/pack.py --config configs/data/photos.yaml --images photos/images "
        "--captions photos/train.csv --output data/photos/train"
    ),
    Step(
        "python -m pacl_scale.cache --config configs/cache/photos.yaml data.root=data/photos/train "
        "output=data/photos/features",
        more=("distributed.ranks=1",),
    ),
    Step(
        "python -m pacl_scale.train --config configs/train/photos.yaml data.root=data/photos/features",
        more=SMALL,
    ),
    Step(
        "python -m pacl_scale.train --config configs/train/photos.yaml data.root=data/photos/features "
        "run=runs/photos-texts unfreeze.text_embedder=true",
        more=SMALL,
    ),
    Step(
        "python -m pacl_scale.evaluate --config configs/eval/captions.yaml --config "
        "configs/eval/voc_annotated.yaml --checkpoint runs/photos retrieval.captions.csv=photos/val.csv "
        "segmentation.voc_annotated.root=annotated"
    ),
    Step(
        "python -m pacl_scale.evaluate --config configs/eval/voc_annotated.yaml --checkpoint runs/photos "
        "methods.mean_pooled=runs/photos-mean segmentation.voc_annotated.root=FOLDER",
        instead=(("FOLDER", "annotated"),),
        copies=(("runs/photos", "runs/photos-mean"),),
    ),
    Step("python -m pacl_scale.report runs/photos"),
    Step(
        "python -m pacl_scale.segment photo.jpg dog sofa",
        copies=(("runs/photos", "runs/demo"),),
    ),
    Step(
        "python -m pacl_scale.export runs/b16 --output pacl-b16",
        copies=(
            ("runs/photos", "runs/b16"),
            ("runs/photos/checkpoints/00000001", "runs/b16/checkpoints/00072000"),
        ),
    ),
    Step("python -m pacl_scale.export runs/b16/checkpoints/00072000 runs/b16 --output pacl-b16-average"),
    Step(
        "python -m pacl_scale.export /shared/runs/paper_b16 --output pacl-b16",
        instead=(("/shared/runs/paper_b16", "runs/photos"), ("--output pacl-b16", "--output pacl-again")),
    ),
)
"""A folder of photographs, from packing to handing on: each needs what those before it wrote."""

PICTURES = (
    Step(
        "python -m pacl_scale.train --config configs/train/paper_b16.yaml data.root=s3://bucket/cc "
        "run=/shared/runs/b16",
        more=ON_CPU,
        instead=PAIRS,
    ),
    Step(
        "python -m pacl_scale.train --config configs/train/paper_b16.yaml data.root=s3://bucket/cc "
        "run=/shared/runs/b16 validate.every_steps=1000 validate.segmentation.root=data/voc "
        "validate.segmentation.layout=voc_20 validate.segmentation.limit=50 "
        "validate.retrieval.karpathy=dataset_flickr8k.json validate.retrieval.limit=500",
        more=(*ON_CPU, "validate.every_steps=1", "validate.segmentation.partial=true"),
        instead=(*PAIRS, ("runs/b16", "runs/validated")),
    ),
    Step(
        "python -m pacl_scale.train --config configs/train/paper_b16.yaml data.root=s3://bucket/cc "
        "run=/shared/runs/blocks unfreeze.vision_blocks=2 unfreeze.tower_lr_share=0.1",
        more=(*ON_CPU, "unfreeze.vision_blocks=1"),
        instead=PAIRS,
    ),
)
"""Trainings on pictures, with towers of two layers."""

BUCKET = "s3://bucket"
LOOPBACK = (
    *("expect.rows=null", "prepare.noun_processes=1", "fetch.processes=1", "fetch.threads=4"),
    "fetch.allowed_networks=[127.0.0.0/8]",
)
LISTS = (
    Step("python data_prep/download.py cc3m --output s3://bucket/cc3m", more=LOOPBACK),
    Step("python data_prep/download.py cc3m --output s3://bucket/cc3m --fetch.contact you@example.org", more=LOOPBACK),
    Step(
        "python data_prep/download.py retry cc3m --output s3://bucket/cc3m --fetch.contact you@example.org",
        more=LOOPBACK,
    ),
    Step("python data_prep/decontaminate.py --images VOCdevkit/VOC2012/JPEGImages --output s3://bucket/voc.txt"),
    Step(
        "python data_prep/decontaminate.py --images data/voc2012/VOCdevkit/VOC2012/JPEGImages "
        "--output s3://bucket/voc.txt",
        instead=(("data/voc2012/", ""), ("voc.txt", "ade.txt")),
    ),
    Step(
        "python data_prep/download.py cc3m --output s3://bucket/cc3m "
        "--fetch.exclude [s3://bucket/voc.txt,s3://bucket/ade.txt]",
        more=LOOPBACK,
        instead=(("--output s3://bucket/cc3m", "--output s3://bucket/cleaned"),),
    ),
    Step("python data_prep/download.py mirror --output s3://bucket/cc3m-wds"),
)
"""A list of URLs, onto an S3 server: ``s3://bucket`` is a folder of the test's own."""

SUBMITTED = (
    "python -m pacl_scale.submit --nodes 8 --cluster configs/clusters/example.yaml --config "
    "configs/train/paper_b16.yaml data.root=s3://bucket/cc3m run=/shared/runs/b16",
    "python -m pacl_scale.submit --nodes 2 --time 00:10:00 --follow --cluster configs/clusters/mine.yaml "
    "--config configs/train/paper_b16.yaml data.root=s3://bucket/cc run=/shared/runs/try steps=50 log_every=1",
    "python -m pacl_scale.submit --nodes 8 --cluster configs/clusters/mine.yaml --config "
    "configs/train/paper_b16.yaml data.root=s3://bucket/cc run=/shared/runs/paper_b16",
    "python -m pacl_scale.submit --nodes 8 --cluster configs/clusters/mine.yaml --config configs/train/paper_b16.yaml "
    "run=/shared/runs/paper_b16 steps=48000 "
    "'data.mix={s3://bucket/cc3m: 1.8, s3://bucket/cc12m: 7.8, s3://bucket/yfcc15m: 9.9}'",
    "python -m pacl_scale.submit --nodes 2 --cluster configs/clusters/mine.yaml --dry-run --config "
    "configs/train/paper_b16.yaml data.root=s3://bucket/cc run=/shared/runs/try",
    "python -m pacl_scale.sweep --config configs/sweeps/paper.yaml --cluster configs/clusters/example.yaml "
    "'checkpoints={b16: /shared/runs/b16}' output=/shared/runs/table",
    "python -m pacl_scale.sweep --config configs/sweeps/paper.yaml --cluster configs/clusters/mine.yaml",
    "python -m pacl_scale.sweep --config configs/sweeps/paper.yaml --cluster configs/clusters/mine.yaml "
    "'checkpoints={b16: /shared/runs/paper_b16, l14: /shared/runs/paper_l14}' output=/shared/runs/table",
)
"""What a Slurm cluster would do for days: as written with ``--dry-run``, against a Slurm that pretends."""

PLANS = (
    "python -m pacl_scale.plan --config configs/train/paper_b16.yaml --nodes 8 --gpus-per-node 8 --gpu h100 "
    "--gpu-hour-price 2.50 --plot plan.svg --json plan.json",
    "python -m pacl_scale.plan --config configs/train/paper_b16.yaml --nodes 8 --gpus-per-node 8 --gpu h100 "
    "--gpu-hour-price 2.50 --storage-price 0.023",
)

EXAMPLES = {
    "Add a data set": "python data_prep/download.py birds --output data/birds",
    "Add an encoder": "python -m pacl_scale.plan vision.source=torchvision vision.model=vit_b_16 "
    "vision.weights=random text.source=package text.model=all-minilm-l6-v2 global_batch_size=1024",
    "Add a protocol": "python -m pacl_scale.evaluate --config configs/eval/voc_annotated.yaml --config "
    "configs/eval/protocol_article.yaml --checkpoint runs/photos segmentation.voc_annotated.root=annotated",
}
"""The worked examples, each after its patch was applied to a copy."""

ELSEWHERE = {
    "make demo": "test_quickstart_pipeline.py::test_the_summary_accounts_for_every_line_of_the_list",
    "pacl-scale --help": "test_config.py::test_console_verbs",
    "make docs": "test_site.py::test_every_page_of_the_navigation_is_there_and_loads_nothing_from_elsewhere",
    "python -m pacl_scale.demo runs/demo": "test_demo.py::test_upload_type_and_see_the_mask_change",
    "python -m pacl_scale.demo CHECKPOINT": "test_demo.py::test_upload_type_and_see_the_mask_change",
    "python data_prep/download.py cc12m --output s3://bucket/cc12m --slurm --slurm.parts 8 --slurm.cpus_per_task 16 "
    "--slurm.mem 64G": "test_data_prep_slurm.py::test_a_list_is_downloaded_by_jobs_on_two_nodes",
    "sbatch --array=0-7 --cpus-per-task=16 --mem=64G slurm/download.sh cc12m --output s3://bucket/cc12m": (
        "test_data_prep_slurm.py::test_a_job_that_is_asked_to_stop_is_queued_again_and_continues"
    ),
    "python data_prep/download.py cc12m --output s3://bucket/cc12m --fetch.exclude [s3://bucket/voc.txt]": (
        "test_data_prep_published.py::test_from_the_list_to_the_index"
    ),
    "python data_prep/download.py cc3m --output s3://bucket/cc3m --fetch.exclude [s3://bucket/voc.txt]": (
        "test_data_prep_published.py::test_from_the_list_to_the_index"
    ),
    "python data_prep/download.py yfcc15m url_list=yfcc100m_subset_data.tsv.bz2 metadata=yfcc100m_dataset.bz2 "
    "output=s3://bucket/yfcc15m --fetch.exclude [s3://bucket/voc.txt]": (
        "test_data_prep_published.py::test_from_the_list_to_the_index"
    ),
    "python -m pacl_scale.evaluate --config configs/eval/official.yaml --check-data": (
        "test_evaluate_official.py::test_check_data_counts_and_verifies"
    ),
    "python -m pacl_scale.evaluate --config configs/eval/classification.yaml --checkpoint RUN "
    '"controls=[untrained, clip, majority_class]"': "test_evaluate_classification.py::test_rows_table_and_report",
}
"""Command to the test that runs it, or the same with other words. Its own words are read here too."""

READ = (
    *("git clone REPOSITORY pacl-scale && cd pacl-scale", "aws s3 cp s3://bucket/cc3m/report.html ."),
    "python3 -m venv .venv && .venv/bin/python -m pip install -c constraints.txt -e .",
    "python -m pip install -c constraints.txt -e '.[page]'",
    *(f"pip install 'pacl-scale[{extra}]'" for extra in ("pyspark", "demo", "classification", "page")),
    "export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=...",
    *("pytest -m slurm", 'module avail 2>&1 | grep -i -E "python|cuda|apptainer"'),
    "df -h $HOME /scratch /shared 2>/dev/null",
    *("python -m build", "pip install pacl_scale-*.whl"),
    "apptainer build /shared/images/pacl.sif apptainer.def",
    "docker build -t pacl-scale . && enroot import -o /shared/images/pacl.sqsh dockerd://pacl-scale",
    "sacctmgr show assoc user=$USER format=account,partition,qos",
    *("pacl-scale VERB", "python -m pacl_scale.VERB"),
)
"""What installs, clones, or asks programs that are not here: the shell reads it, and what it names is there."""

MAKE = (
    *(
        "make lint",
        "make test",
        "make test-changed",
        "make test-changed BASE=main",
        "make test-times",
        "make audit",
        "make help",
        "make docs",
        "make demo",
    ),
    *('make test ARGS="-k resize"', "make test ARGS=tests/test_loss.py", "make demo PYTHON=python3.12"),
)
"""``make --dry-run`` says what each would do."""

BENCHMARKS = (
    "python benchmarks/similarity.py --kernels --json similarity.json --plots docs/images",
    "python benchmarks/loss_scaling.py --json loss_scaling.json --plots docs/images",
    *("python benchmarks/cluster.py --json FILE", "python benchmarks/loader.py --clients"),
    *("python benchmarks/evaluate.py --quick --json FILE", "python benchmarks/engine.py --quick"),
    "python benchmarks/patch_sampling.py runs/demo --seeds 0 1 2",
    *("python benchmarks/gpu.py --parts similarity sizes --json gpu.json", "python benchmarks/gpu.py --parts step"),
    *("python benchmarks/similarity.py --kernels", "python benchmarks/quantisation.py runs/demo --steps 80"),
)
"""Minutes each: the words are held against their parsers."""

NAMED = (
    *("python -m pacl_scale.plan", "python -m pacl_scale.train", "python -m pacl_scale.evaluate"),
    *("python -m pacl_scale.job", "python data_prep/download.py", "python -m data_prep.download"),
)
"""Commands that a page only names."""

HELPED = ("python -m pacl_scale.submit --help", "python -m pacl_scale.train --help")
"""As written."""

ON_SLURM = (
    'sinfo -o "%P %a %l %D %c %m %G"',
    'scontrol show config | grep -E "MaxArraySize|KillWait|JobRequeue|PreemptMode"',
)
"""As written, on a Slurm cluster."""

HOOKS = (".venv/bin/pre-commit install",)
"""As written, in a small checkout."""


def every_place() -> list[str]:
    """Each command of the tables above, once for each table that it is in."""
    steps = [step.command for step in (*PHOTOGRAPHS, *PICTURES, *LISTS)]
    tables = (SUBMITTED, PLANS, EXAMPLES.values(), ELSEWHERE, READ, MAKE, BENCHMARKS, NAMED, HELPED, ON_SLURM, HOOKS)
    return [*steps, *(command for table in tables for command in table)]
