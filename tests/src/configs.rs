//! Configs: what ships can be laid out as it says, what no key can mean is refused, and a phase that is over binds nobody.
use crate::support::{Run, root, tiny};
use kernels::ops::rope::RopeScaling;
use model::ModelConfig;
use model::config::Scoring;
use model::hf::{config_json, parse_config};
use parallel::comm::local::run_local;
use parallel::schedule::Schedule;
use serde_json::{Value, json};
use trainer::RunConfig;
use trainer::coordinator::StopSignal;
use trainer::estimate::{Need, needs};
use trainer::phase::Plan;
use trainer::run::{Start, prove_schedules, train};

fn shipped(name: &str) -> RunConfig {
    RunConfig::load(&root().join("configs/run").join(name), &[]).expect("a shipped config")
}

/// On nodes of eight: nothing of it needs a GPU.
fn lines_of_layout(config: &RunConfig, ranks: usize) -> Vec<String> {
    let nodes: Vec<usize> = (0..ranks).map(|rank| rank / 8).collect();
    let mesh = config.mesh(&nodes).expect("a layout");
    assert_eq!((mesh.pp, mesh.pp * mesh.dp, mesh.schedule), (16, ranks, Schedule::DualPipe));
    prove_schedules(config, &mesh, 0).expect("whole micro-batches and proven schedules")
}

#[test]
fn the_published_recipe_is_laid_out_on_its_ranks() {
    let (main, context) = (shipped("v3-671b.toml"), shipped("v3-671b-context.toml"));
    let one_way = |lines: Vec<String>| {
        assert!(lines.iter().all(|line| line.contains("run 1f1b")), "{lines:?}");
        let counts = lines.iter().map(|line| line.split(' ').nth(2).and_then(|count| count.parse().ok()).expect("steps of N micro-batches"));
        counts.collect::<Vec<usize>>()
    };
    // 3072 to 3840 sequences, 256 more each time, on 128 pipes; then 1920 and 480 on 96.
    assert_eq!(one_way(lines_of_layout(&main, 2048)), [24, 26, 28, 30]);
    assert_eq!(one_way(lines_of_layout(&context, 1536)), [5, 20]);
    // An H800 has 79 GiB, of which transfers, transient tensors and the allocator need some.
    let mesh = main.mesh(&(0..2048).map(|rank| rank / 8).collect::<Vec<_>>()).expect("a layout");
    let most = |load| needs(&main, &mesh, load, 0).expect("an estimate").iter().map(Need::most).max().expect("places");
    assert!(most(1.0) < 70 << 30 && most(1.1) < 72 << 30, "{} bytes", most(1.1));
    let tokens = |config: &RunConfig| Plan::new(&config.phase, &config.data.mixture).total_tokens();
    assert_eq!(tokens(&main), 14_800_000_000_000);
    assert_eq!(Plan::new(&context.phase, &context.data.mixture).num_steps(), 2000);
    assert!(main.ema.decay > 0.0 && main.model == context.model);
    // As a resume of the first has them: its own phases, which fit no 96 pipes, are over.
    let joined = RunConfig { parallel: context.parallel.clone(), phase: [main.phase.clone(), context.phase].concat(), ..main.clone() };
    let mesh = joined.layout(&vec![0; 1536]).expect("a layout");
    assert_eq!(one_way(prove_schedules(&joined, &mesh, tokens(&main)).expect("what is to come")), [5, 20]);
    let error = prove_schedules(&joined, &mesh, 26_000_000_000).expect_err("a ramp by 256 sequences on 96 pipes");
    assert!(format!("{error:#}").starts_with("phase.1: batch 256 is not a multiple"), "{error:#}");
}

#[test]
fn commands_that_are_shown_have_a_layout() {
    let mut shown = 0;
    for file in ["README.md", "scripts/train.sbatch", "scripts/namespaces.sh", "launch/src/args.rs", "trainer/src/main.rs"] {
        let text = std::fs::read_to_string(root().join(file)).expect("text");
        for line in text.replace("\\\n", " ").replace("\\n", "\n").lines() {
            let words: Vec<&str> = line.split(|c: char| c.is_whitespace() || "=\"".contains(c)).collect();
            let Some(config) = words.iter().find(|word| word.starts_with("configs/run/") && word.ends_with(".toml")) else { continue };
            if !words.contains(&"train") && !words.contains(&"plan") {
                continue;
            }
            let of = |name: &str, at: usize| words.iter().position(|word| word.ends_with(name)).map_or(1, |name| words[name + at].parse().expect(line));
            let options = ["-n", "--ranks", "--nproc-per-node", "--nodes", "--ntasks-per-node"];
            let ranks = options.iter().map(|option| of(option, 1)).product::<usize>() * of("namespaces.sh", 1) * of("namespaces.sh", 2);
            let set: Vec<String> = line.split_whitespace().filter(|word| word.starts_with("parallel.") || word.starts_with("phase.")).map(String::from).collect();
            let config = RunConfig::load(&root().join(config), &set).unwrap_or_else(|error| panic!("{file}: {line}: {error:#}"));
            let mesh = config.mesh(&(0..ranks).map(|rank| rank / 8).collect::<Vec<_>>());
            let proven = mesh.and_then(|mesh| prove_schedules(&config, &mesh, 0));
            let notes = proven.unwrap_or_else(|error| panic!("{file}: on {ranks} ranks: {line}: {error:#}"));
            assert!(notes.is_empty() || set.is_empty(), "{file}: {line}: not as shown: {notes:?}");
            shown += 1;
        }
    }
    assert!(shown >= 10, "only {shown} are found");
}

#[test]
fn a_phase_that_is_over_binds_no_layout() {
    let set = ["phase.1.micro_batch=1"];
    let (whole, parts) = (Run::new("over-whole", &set), Run::new("over-parts", &set));
    let go = |run: &Run, ranks, start, stop_after| {
        let mut config = run.config();
        config.run.stop_after = stop_after;
        run_local(ranks, |world| train(&config, world, start, &StopSignal::default()).map(|_| ()).map_err(|error| format!("{error:#}"))).remove(0)
    };
    go(&whole, 1, Start::Fresh, None).expect("the run");
    // Batches of 4 to 12, then of 8: eight ranks can do the second phase alone.
    let refused = "phase.0: batch 4 is not a multiple of micro_batch 1 × dp 8 = 8";
    assert_eq!(go(&parts, 8, Start::Fresh, None).expect_err("refused"), refused);
    go(&parts, 1, Start::Fresh, Some(10)).expect("a stop in the first phase");
    assert_eq!(go(&parts, 8, Start::Resume, None).expect_err("refused"), refused);
    go(&parts, 1, Start::Resume, Some(23)).expect("a stop in the second phase");
    go(&parts, 8, Start::Resume, None).expect("the rest");
    parts.assert_same(&whole, 1e-9);
}

#[test]
fn a_number_that_is_none_is_refused_by_name() {
    let more = ["data.mixture=[{path=\"a\"},{path=\"b\",weight=1.0}]", "ema.decay=0.9"];
    for (key, value) in [
        ("optimizer.weight_decay", "inf"),
        ("optimizer.weight_decay", "nan"),
        ("optimizer.max_grad_norm", "inf"),
        ("optimizer.eps", "inf"),
        ("optimizer.beta2", "-inf"),
        ("data.mixture.1.weight", "inf"),
        ("ema.decay", "nan"),
        ("guard.loss_spike", "inf"),
        ("phase.0.lr.to", "inf"),
        ("phase.1.bias_speed", "nan"),
        ("model.rope_theta", "inf"),
    ] {
        let set: Vec<String> = more.map(String::from).into_iter().chain([format!("{key}={value}")]).collect();
        let error = RunConfig::load(&root().join("configs/run/tiny.toml"), &set).expect_err(key);
        let expected = format!("{key} = {}: must be finite", value.replace("nan", "NaN"));
        assert!(format!("{error:#}").ends_with(&expected), "{error:#}, not {expected}");
    }
}

#[test]
fn a_number_out_of_its_range_is_refused_by_name() {
    let yarn = "factor=2.0,original_max_position_embeddings=64";
    for (key, value, expected) in [
        ("model.rms_norm_eps", "0.0".into(), "model.rms_norm_eps = 0: must be positive"),
        ("model.routed_scaling_factor", "-1.0".into(), "model.routed_scaling_factor = -1: must be positive"),
        ("model.initializer_range", "0.0".into(), "model.initializer_range = 0: must be positive"),
        ("model.rope_theta", "1.0".into(), "model.rope_theta = 1: must be above 1"),
        ("model.rope_scaling", "{factor=0.0,original_max_position_embeddings=64}".into(), "model.rope_scaling.factor = 0: must be at least 1"),
        ("phase.1.rope_scaling", "{factor=2.0,original_max_position_embeddings=0}".into(), "rope_scaling.original_max_position_embeddings = 0: must be at least 1"),
        ("phase.1.rope_scaling", format!("{{{yarn},beta_slow=0.0}}"), "rope_scaling.beta_slow = 0: must be positive"),
        ("phase.1.rope_scaling", format!("{{{yarn},beta_slow=40.0}}"), "rope_scaling.beta_fast = 32: must be at least beta_slow = 40"),
        ("phase.1.rope_scaling", format!("{{{yarn},mscale=-1.0}}"), "rope_scaling.mscale = -1: must not be negative"),
        ("data.mixture", "[{path=\"a\",weight=0.0}]".into(), "data.mixture.0.weight = 0: must be positive; leave out a source that has no share"),
        ("phase.1.mixture", "[{path=\"a\"},{path=\"b\",weight=-1.0}]".into(), "phase.1: mixture.1.weight = -1: must be positive; leave out a source that has no share"),
        ("phase.1.lr", "-1.0".into(), "phase.1: lr = -1: must not be negative"),
        ("phase.1.lr.from", "-1.0".into(), "phase.1: lr.from = -1: must not be negative"),
        ("phase.1.lr.to", "-1.0".into(), "phase.1: lr.to = -1: must not be negative"),
        ("phase.1.batch", "0".into(), "phase.1: batch = 0: must be from 1 to 1073741824"),
        ("phase.0.batch.from", "0".into(), "phase.0: batch.from = 0: must be from 1 to 1073741824"),
        ("phase.0.batch.to", "0".into(), "phase.0: batch.to = 0: must be from 1 to 1073741824"),
        ("phase.0.batch.multiple", "0".into(), "phase.0: batch.multiple = 0: must be from 1 to 1073741824"),
        ("phase.0.batch.from", "6".into(), "phase.0: batch.from = 6: must be a multiple of batch.multiple = 4"),
        ("run.dir", "\"\"".into(), "run.dir = \"\": must name a folder"),
        ("checkpoint.second_tier.dir", "\"\"".into(), "checkpoint.second_tier.dir = \"\": must name a folder"),
        ("model.qk_rope_head_dim", "16777218".into(), "model.qk_rope_head_dim = 16777218: must be even, from 2 to 16777216"),
        ("model.qk_rope_head_dim", "3".into(), "model.qk_rope_head_dim = 3: must be even, from 2 to 16777216"),
        ("model.num_hidden_layers", "4097".into(), "model.num_hidden_layers = 4097: must be from 1 to 4096"),
        ("model.n_routed_experts", "65537".into(), "model.n_routed_experts = 65537: must be from 0 to 65536"),
        ("model.n_shared_experts", "65537".into(), "model.n_shared_experts = 65537: must be from 0 to 65536"),
        ("run.threads", "1025".into(), "run.threads = 1025: must be from 0 to 1024"),
        ("optimizer", "{moments=\"bf16\",beta2=0.999}".into(), "optimizer.beta2 = 0.999: at most 0.99 with optimizer.moments = \"bf16\", whose last place is too coarse to follow slower changes"),
        ("ema.decay", "0.999999".into(), "ema.decay = 0.999999: must be from 0 (no average) to 0.99999, beyond which numbers in FP32 stand still"),
    ] {
        let error = RunConfig::load(&root().join("configs/run/tiny.toml"), &[format!("{key}={value}")]).expect_err(key);
        assert!(format!("{error:#}").ends_with(expected), "{error:#}, not {expected}");
    }
}

/// Each size within its limit, and products that are no numbers of 64 bits.
#[test]
fn a_model_of_more_parameters_than_can_be_counted_is_refused() {
    let wide = ModelConfig { hidden_size: 1 << 24, moe_intermediate_size: 1 << 24, n_routed_experts: 1 << 16, ..tiny() };
    let error = wide.validate().expect_err("too large").to_string();
    let begins = "model.hidden_size = 16777216: with the other sizes makes a model of ";
    assert!(error.starts_with(begins) && error.ends_with(" parameters, at most 9007199254740992"), "{error}");
    let dense = ModelConfig { first_k_dense_replace: 3, num_nextn_predict_layers: 0, num_attention_heads: 1 << 24, v_head_dim: 1 << 24, ..tiny() };
    let error = dense.validate().expect_err("too large").to_string();
    assert!(error.contains("parameters, at most 9007199254740992"), "{error}");
}

#[test]
fn another_model_is_set_from_where_the_command_is_given() {
    let set = ["model.num_hidden_layers=4", "model=../configs/model/v3-slice.toml"].map(String::from);
    let config = RunConfig::load(&root().join("configs/run/tiny.toml"), &set).expect("a config");
    assert_eq!((config.model.hidden_size, config.model.num_hidden_layers), (7168, 4));
    let error = RunConfig::load(&root().join("configs/run/tiny.toml"), &["model=nowhere.toml".into()]).expect_err("no such file");
    assert!(format!("{error:#}").contains("cannot read the config nowhere.toml"), "{error:#}");
}

/// Run directories that older versions made have it in their config.
#[test]
fn what_no_longer_is_a_choice_is_read_and_not_written() {
    let set = ["run.deterministic=false".to_string()];
    let config = RunConfig::load(&root().join("configs/run/tiny.toml"), &set).expect("an older config");
    assert_eq!(config, RunConfig::load(&root().join("configs/run/tiny.toml"), &[]).expect("a config"));
    assert!(!config.to_toml().expect("TOML").contains("deterministic"));
    let error = RunConfig::load(&root().join("configs/run/tiny.toml"), &["run.determinstic=true".into()]).expect_err("no key");
    let error = format!("{error:#}");
    assert!(error.contains("unknown field `determinstic`") && error.contains("`threads`") && !error.contains("deterministic"), "{error}");
}

#[test]
fn what_transformers_5_writes_of_rope_is_read() {
    let yarn: RopeScaling = serde_json::from_value(json!({"factor": 4.0, "original_max_position_embeddings": 128})).expect("YaRN");
    let config = ModelConfig { rope_theta: 5e4, rope_scaling: Some(yarn), ..tiny() };
    let mut value = config_json(&config, "float32");
    // 4 · 128, for readers that divide.
    assert_eq!(value["max_position_embeddings"], 512);
    let keys = value.as_object_mut().expect("an object");
    let (mut rope, theta) = (keys.remove("rope_scaling").expect("YaRN"), keys.remove("rope_theta").expect("theta"));
    rope["rope_theta"] = theta;
    keys.insert("rope_parameters".into(), rope);
    let read = parse_config(&value).expect("a config");
    assert_eq!(read, ModelConfig { max_position_embeddings: 512, ..config });
    value["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 5e4});
    assert_eq!(parse_config(&value).expect("a config"), ModelConfig { rope_scaling: None, ..read });
}

#[test]
fn what_would_be_another_model_is_refused() {
    let yarn = |key: &str, other: Value| json!({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, key: other});
    for (key, other) in [
        ("attention_bias", json!(true)),
        ("rope_interleave", json!(false)),
        ("moe_layer_freq", json!(2)),
        ("mlp_bias", json!(true)),
        ("model_type", json!("deepseek_v32")),
        ("topk_method", json!("greedy")),
        ("rope_scaling", json!({"rope_type": "linear", "factor": 2.0})),
        ("rope_scaling", yarn("attention_factor", json!(1.3))),
        ("rope_scaling", yarn("truncate", json!(false))),
        ("quantization_config", json!({"weight_block_size": [64, 64]})),
    ] {
        let mut value = config_json(&tiny(), "float32");
        value[key] = other;
        let error = parse_config(&value).expect_err(key).to_string();
        assert!(error.contains(" is implemented") && (["rope_scaling", "quantization_config"].contains(&key) || error.contains(key)) || error.contains("linear"), "{error}");
    }
}

#[test]
fn an_export_names_the_factor_that_transformers_would_not_find() {
    let yarn = RopeScaling { factor: 8.0, original_max_position_embeddings: 32, beta_fast: 32.0, beta_slow: 1.0, mscale: 0.5, mscale_all_dim: 0.0 };
    let exported = |mscale_all_dim: f64| {
        let config = ModelConfig { rope_scaling: Some(RopeScaling { mscale_all_dim, ..yarn.clone() }), ..tiny() };
        let value = config_json(&config, "float32");
        assert_eq!(parse_config(&value).expect("a config").rope_scaling, config.rope_scaling);
        value["rope_scaling"]["attention_factor"].as_f64()
    };
    // transformers would take 0.1 ln 8 + 1.
    assert_eq!(exported(0.0), Some(0.05 * 8f64.ln() + 1.0));
    assert_eq!(exported(0.5), None, "it divides the two itself");
}

#[test]
fn deepseek_v2_scores_by_softmax_where_its_config_does_not_say() {
    let softmax = ModelConfig { scoring_func: Scoring::Softmax, norm_topk_prob: false, ..tiny() };
    let mut value = config_json(&softmax, "float32");
    value.as_object_mut().expect("an object").retain(|key, _| !["scoring_func", "norm_topk_prob"].contains(&key.as_str()));
    assert_eq!(parse_config(&value).expect("a config"), softmax);
    // Its greedy routing does not look at groups.
    value["topk_method"] = json!("greedy");
    assert_eq!(parse_config(&value).expect("a config"), ModelConfig { n_group: 1, topk_group: 1, ..softmax });
}

#[test]
fn deepseek_v3_has_its_own_routing_where_its_config_does_not_say() {
    let mut value = config_json(&ModelConfig { n_routed_experts: 16, ..tiny() }, "float32");
    value.as_object_mut().expect("an object").retain(|key, _| !["n_group", "topk_group", "routed_scaling_factor"].contains(&key.as_str()));
    let read = parse_config(&value).expect("a config");
    assert_eq!((read.n_group, read.topk_group, read.routed_scaling_factor), (8, 4, 2.5));
    value["model_type"] = json!("kimi_k2");
    assert_eq!(parse_config(&value).expect("V3's architecture"), read);
}

#[test]
fn softmax_scoring_does_not_renormalise() {
    let softmax = ModelConfig { scoring_func: Scoring::Softmax, ..tiny() };
    let error = softmax.validate().expect_err("renormalised").to_string();
    assert!(error.contains("model.norm_topk_prob"), "{error}");
    ModelConfig { norm_topk_prob: false, ..softmax }.validate().expect("a model");
}

/// By a run that begins; one that has begun goes on.
#[test]
fn what_does_nothing_with_the_model_is_refused_by_name() {
    let softmax = ["model.scoring_func=softmax", "model.norm_topk_prob=false"];
    let loaded = |set: &[&str]| {
        let set: Vec<String> = set.iter().map(|set| set.to_string()).collect();
        RunConfig::load(&root().join("configs/run/tiny.toml"), &set).expect("a config")
    };
    let dense = ["model.first_k_dense_replace=3", "model.num_nextn_predict_layers=0", "phase.1.mtp_weight=0"];
    for (set, expected) in [
        ([&softmax[..], &["phase.0.bias_speed=0.02"]].concat(), "phase.0: bias_speed = 0.02: does nothing with model.scoring_func = \"softmax\", whose gates have no bias: leave it out, or 0"),
        (vec!["model.num_nextn_predict_layers=0"], "phase.1: mtp_weight = 0.1: does nothing with model.num_nextn_predict_layers = 0: leave it out, or 0"),
        (dense.to_vec(), "phase.1: balance_weight = 0.01: does nothing without experts (model.first_k_dense_replace): leave it out, or 0"),
        ([&dense[..], &["phase.0.bias_speed=0.02"]].concat(), "phase.0: bias_speed = 0.02: does nothing without experts (model.first_k_dense_replace): leave it out, or 0"),
        ([&softmax[..], &["model.num_attention_heads=5"]].concat(), "model.hidden_size = 32: must be a multiple of num_attention_heads = 5 with softmax scoring: transformers takes no other config of DeepSeek-V2"),
    ] {
        let error = loaded(&set).begins().expect_err(expected);
        assert_eq!(format!("{error:#}"), expected);
    }
    // What is off, and defaults, which stand in what another run has written.
    for set in [&softmax[..], &["phase.0.bias_speed=0.02"], &[&dense[..], &["phase.0.bias_speed=0", "phase.1.balance_weight=1e-4"]].concat()] {
        loaded(set).begins().expect("all of it is used");
    }
}

#[test]
fn a_rank_of_a_gpu_has_experts_whose_tiles_cuda_counts() {
    let laid_out = |set: &[&str]| {
        let set: Vec<String> = ["model.n_routed_experts=65536", "model.hidden_size=16"].iter().chain(set).map(|set| set.to_string()).collect();
        RunConfig::load(&root().join("configs/run/tiny.toml"), &set).expect("a config").layout(&[0, 0]).map(|_| ()).map_err(|error| error.to_string())
    };
    let refusal = "parallel.ep = 1: a rank would have 65536 experts of a layer, on a GPU at most 32768";
    assert_eq!(laid_out(&["run.device=cuda"]), Err(refusal.into()));
    assert_eq!([laid_out(&["run.device=cuda", "parallel.ep=2"]), laid_out(&[])], [Ok(()), Ok(())]);
}
