"""What we lean on in Lightning beside its documented interface, in one place (tests/test_host_hooks.py checks it).

- `LightningModule._trainer`, which is None where `trainer` raises: our modules can be used without a Trainer.
- `LightningCLI._parse_ckpt_path` (recipes/lightning_classic.py), which puts a checkpoint's settings over those given.
- `FitLoop._data_fetcher`, its `iterator`, which gives `(batch, index, loader)`, and its `batches`, which Lightning has
  fetched where the loader has no length; `FitLoop._should_accumulate` and `epoch_loop.batch_progress`; and
  `LightningModule._on_before_batch_transfer`, which goes before `Strategy.batch_to_device`
  (lightning/accumulation.py).
- `DeepSpeedStrategy._init_deepspeed_distributed`, and `setup_environment` of the class that it extends.

Documented, but easy to overlook: a loader with `state_dict` and `load_state_dict` is resumed in the middle of an
epoch; a `val_dataloader` that is None counts as not defined; `configure_callbacks` of a module replaces callbacks of
the same class in the Trainer, so ours brings none where there is one.
"""
