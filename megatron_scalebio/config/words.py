"""Words that people bring along from LLaMA-Factory, axolotl, transformers, TRL and torchtune: what they are here."""

# What there is here, and how the others call it.
_HERE = {
    "model.hf_path": "model_name_or_path base_model model_name checkpoint_dir checkpointer pretrained_model",
    "model.family": "model_type architecture",
    "model.implementation": "attn_implementation flash_attention flash_attn sdp_attention xformers_attention",
    "data.tokenizer": "tokenizer_name_or_path tokenizer_path tokenizer_type tokenizer_name tokenizer_config",
    "data.template": "chat_template chat_template_path conversation_template prompt_template",
    "data.sources": "dataset datasets train dataset_name train_file train_files train_dataset dataset_path data_path"
    " data_files train_data",
    "data.validation, a file, which drives the weights": "eval_dataset val_size val_set_size test_datasets"
    " validation_file eval_file val_file eval_data dataset_val val",
    "data.test": "test_dataset test_file test_data",
    "data.max_length": "cutoff_len max_seq_length sequence_len max_seq_len seq_length seq_len model_max_length",
    "data.over_length": "truncation truncation_mode excess_length_strategy",
    "data.packing": "sample_packing neat_packing packed padding_free",
    "data.response_loss_only": "train_on_inputs train_on_prompt completion_only_loss assistant_only_loss"
    " roles_to_train mask_history train_on_input",
    "data.micro_batch_size, rows at a time, and bilevel.global_batch_size, examples per step": "batch_size"
    " per_device_train_batch_size micro_batch_size train_batch_size per_device_batch_size",
    "it follows from bilevel.global_batch_size": "gradient_accumulation_steps accumulation_steps grad_accum",
    "bilevel.validation_batch_size": "per_device_eval_batch_size eval_batch_size",
    "bilevel.steps": "num_train_epochs max_steps epochs num_epochs num_epoch max_steps_per_epoch train_steps"
    " train_iters total_steps",
    "data.sampling": "mix_strategy",
    "optimizer.lr": "learning_rate max_lr base_lr",
    "optimizer.schedule": "lr_scheduler_type lr_scheduler scheduler lr_schedule",
    "optimizer.warmup, a share of the steps": "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps",
    "optimizer.lr_end, a share of the rate": "min_lr min_lr_ratio lr_min",
    "optimizer.betas": "adam_beta1 adam_beta2 beta1 beta2",
    "optimizer.eps": "adam_epsilon epsilon",
    "optimizer.clip_grad": "max_grad_norm clip_grad_norm gradient_clipping grad_clip gradient_clip_val",
    "precision.compute": "dtype torch_dtype mixed_precision",
    "precision.compute=bf16": "bf16 fp16 pure_bf16",
    "precision.compute=fp8": "fp8",
    "precision.frozen_weights=fp8": "load_in_8bit quantization_bit",
    "parallel.tensor": "tensor_model_parallel_size tensor_parallel_size tp tp_size tensor_parallel_dim",
    "parallel.pipeline": "pipeline_model_parallel_size pipeline_parallel_size pp pp_size",
    "parallel.sequence": "sequence_parallel",
    "parallel.recompute": "gradient_checkpointing enable_activation_checkpointing activation_checkpointing"
    " recompute_granularity",
    "run.output_dir": "save_dir logging_dir log_dir",
    "run.save_every": "save_steps save_strategy saves_per_epoch save_interval checkpoint_interval",
    "run.eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval"
    " run_val_every_n_steps",
    "run.resume=auto": "resume_from_checkpoint auto_resume_from_checkpoints",
    "lisa.num_active_layers, beside lisa.always_active": "lisa_n_layers lisa_activated_layers freeze_trainable_layers"
    " freeze_trainable_modules unfrozen_parameters",
    "lisa.period": "lisa_step_interval lisa_interval_steps",
}

# What there is not, and what to do instead.
_ABSENT = {
    "there are no adapters: the model itself trains, lisa.num_active_layers layers at a time": "lora qlora peft adapter"
    " lora_rank lora_alpha lora_r lora_dropout lora_target lora_target_modules lora_target_linear lora_model_dir"
    " use_peft finetuning_type use_dora lora_modules_to_save lora_attn_modules use_rslora peft_config",
    "there is no 4-bit training: precision.frozen_weights=fp8 saves the most": "load_in_4bit quantization"
    " quantization_config bnb_4bit_quant_type quantization_method",
    "there is no ZeRO or FSDP: parallel.tensor and parallel.pipeline cut the model": "deepspeed fsdp fsdp_config"
    " fsdp_version zero_stage zero_optimization memory_efficient_fsdp_wrap fsdp_cpu_offload",
    "there is no context parallelism": "context_parallel_size cp_size context_parallel_dim",
    "metrics.jsonl in run.output_dir has every number of every step; there is no other writer yet": "report_to wandb"
    " use_wandb wandb_project wandb_entity wandb_name wandb_watch wandb_log_model wandb_run_id use_tensorboard"
    " use_mlflow metric_logger swanlab_project use_swanlab logging_steps logging_strategy log_every_n_steps"
    " log_level run_name plot_loss log_peak_memory_stats",
    "weights are learned; bilevel.weights says where they start": "weight proportion probabilities interleave_probs"
    " mixing_probs sampling_weights domain_weights source_weights",
    "there is no dropout": "dropout attention_dropout hidden_dropout neftune_noise_alpha",
    "both models train with AdamW": "optim optim_args adam_type optimizer_type optimizer_name optimizers",
    "training is always supervised fine-tuning": "stage do_train do_eval do_predict rl trainer_type train_type"
    " dpo_beta pref_beta",
    "every record of a file is used: cut the file": "max_samples max_train_samples max_eval_samples",
    "nothing to set: data is tokenised in memory at the start": "preprocessing_num_workers dataloader_num_workers"
    " overwrite_cache dataset_num_proc dataset_prepared_path tokenized_path dataset_processes streaming"
    " preprocessing_batch_size num_workers dataloader_pin_memory",
    "every epoch of a source is a new permutation from run.seed; data.replacement draws anew": "shuffle shuffle_dataset"
    " data_seed",
    "nothing to set: a run's folder is never overwritten; take another run.output_dir": "overwrite_output_dir",
    "every checkpoint is kept": "save_total_limit save_only_model",
    "nothing to set: no code of a checkpoint is run": "trust_remote_code",
    "nothing to set: the kernels are chosen by themselves": "use_liger_kernel enable_liger_kernel torch_compile compile"
    " flash_attention_2 tf32 use_unsloth",
    "a record's keys tell its format": "dataset_text_field formatting type field_messages prompt_column"
    " response_column column_map message_property_mappings",
    "ranks are started by `launch --nproc N`, torchrun or Slurm": "num_processes nproc_per_node world_size num_gpus"
    " n_gpu ddp_timeout local_rank num_machines",
    "nothing is named by its place in Python here": "_component_ _target_",
    "nothing is uploaded: run.output_dir/hf is a Hugging Face folder": "push_to_hub hub_model_id hub_token",
}

HERE = {word: f"here: {ours}" for ours, words in _HERE.items() for word in words.split()}
ABSENT = {word: instead for instead, words in _ABSENT.items() for word in words.split()}


def bare(key: str) -> str:
    """A key's last part, as the tables have it: `train.learning-rate` and `--learning_rate` are `learning_rate`."""
    return key.rpartition(".")[2].lstrip("-").lower().replace("-", "_")
