use super::*;
use tch::Tensor;

fn section(text: &str) -> Result<FaultsSection> {
    let section: FaultsSection = toml::from_str(text)?;
    section.validate()?;
    Ok(section)
}

#[test]
fn errors_name_key_and_limit() {
    let error = |text: &str| section(text).and_then(|section| section.plan(4).map(|_| ())).expect_err("wrong").to_string();
    assert_eq!(error("inject = [{ kind = \"kill\", rank = 4, step = 9 }]"), "faults.inject.0: rank = 4: the world has ranks 0 to 3");
    assert_eq!(error("inject = [{ kind = \"kill\", rank = 0, step = 0 }]"), "faults.inject.0: step = 0: the first step is 1");
    assert!(error("inject = [{ kind = \"kil\", rank = 0, step = 1 }]").contains("unknown variant `kil`, expected one of `kill`, `hang`"));
    assert!(error("inject = [{ kind = \"kill\", rank = 0, stop = 1 }]").contains("unknown field `stop`"));
    let random = |rest: &str| format!("random = {{ seed = 1, {rest} }}");
    assert_eq!(
        error(&random("count = 9, first = 3, last = 10, kinds = [\"nan\"]")),
        "faults.random.count = 9: there are only 8 steps from 3 to 10"
    );
    assert_eq!(error(&random("count = 1, first = 3, last = 10, kinds = []")), "faults.random.kinds = []: must name at least one kind");
    assert_eq!(
        section("inject = [{ kind = \"lost-message\", rank = 0, step = 1 }]").expect("a section").plan(1).expect_err("alone").to_string(),
        "faults.inject.0: a lost-message needs two ranks"
    );
}

#[test]
fn random_faults_are_a_function_of_their_seed_at_steps_of_their_own() {
    let plan = |seed: u64| {
        section(&format!("random = {{ seed = {seed}, count = 20, first = 5, last = 30, kinds = [\"nan\", \"slow\"] }}"))
            .expect("a section")
            .plan(3)
            .expect("a plan")
    };
    let faults = plan(1);
    assert_eq!(faults, plan(1));
    assert_ne!(faults, plan(2));
    let steps: BTreeSet<u64> = faults.iter().map(|fault| fault.step).collect();
    assert!(steps.len() == 20 && steps.iter().all(|step| (5..=30).contains(step)));
    assert!(faults.iter().all(|fault| fault.rank < 3) && [0, 1, 2].iter().all(|rank| faults.iter().any(|fault| fault.rank == *rank)));
    assert!([FaultKind::Nan, FaultKind::Slow].iter().all(|kind| faults.iter().any(|fault| fault.kind == *kind)));
}

#[test]
fn a_fault_happens_once_in_the_life_of_a_run_directory() {
    let folder = tempfile::tempdir().expect("a folder");
    std::fs::create_dir(folder.path().join("log")).expect("a folder");
    let section = section("inject = [{ kind = \"nan\", rank = 1, step = 7 }, { kind = \"spike\", rank = 0, step = 7 }, { kind = \"full-disk\", rank = 1, step = 3 }]").expect("a section");
    let open = || Faults::open(&section, folder.path(), (1, 2)).expect("faults");
    let fired = |faults: &mut Faults, step: u64| {
        let gradients = [Tensor::from_slice(&[0.5f32; 8])];
        let changed = faults.in_gradients(step, &gradients);
        assert_eq!(gradients[0].isnan().any().int64_value(&[]) == 1, changed);
        changed
    };
    let mut faults = open();
    assert!(!fired(&mut faults, 6) && faults.disk(2).is_ok());
    assert!(fired(&mut faults, 7));
    // A restart does the step again.
    let mut faults = open();
    assert!(!fired(&mut faults, 7));
    // The next save after the step, not only one at it.
    assert_eq!(faults.disk(4).expect_err("no room").kind(), std::io::ErrorKind::StorageFull);
    assert!(open().waiting.is_empty(), "the spike is another rank's");
}

#[test]
fn the_top_bit_of_an_exponent_makes_at_least_two_of_what_was_less() {
    for kind in [Kind::Float, Kind::Double, Kind::BFloat16] {
        for (value, seed) in [(0.0, 1), (1e-3, 2), (-0.7, 3), (1.5, 4)] {
            let tensor = Tensor::full([5], value, (kind, Device::Cpu));
            memory::flip(&tensor, &mut Dice(seed), Some(memory::bits(kind) - 2));
            let largest = tensor.to_kind(Kind::Double).abs().max().double_value(&[]);
            assert!(largest >= 2.0 || largest.is_nan(), "{value} in {kind:?} became {largest}");
            assert_eq!(tensor.ne(value).sum(Kind::Int64).int64_value(&[]), 1, "one element");
        }
    }
}
