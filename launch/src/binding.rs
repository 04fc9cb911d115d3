//! Which GPU is a rank's, and the processor cores beside it.
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{AccessFlags, Pid, access};
use std::fs;
use std::path::Path;

/// CUDA_VISIBLE_DEVICES of a rank: its own GPU first, so that it is device 0, and behind it its peers', which direct copies
/// between ranks need to see. `visible`: what the environment allows; None: all `count`.
pub fn visible_devices(visible: Option<&str>, count: usize, local_rank: usize) -> Option<String> {
    let mut devices: Vec<String> = match visible {
        Some(text) => text.split(',').map(|device| device.trim().to_string()).filter(|device| !device.is_empty()).collect(),
        None => (0..count).map(|device| device.to_string()).collect(),
    };
    if devices.is_empty() {
        return None;
    }
    let own = local_rank % devices.len();
    devices.rotate_left(own);
    Some(devices.join(","))
}

/// Keeps this process, and what it becomes, on the cores of the NUMA node that GPU number `device` hangs at, in PCI order of those
/// that it may open, as CUDA counts. Does nothing where the system does not tell, or where only one node is.
pub fn bind_near(device: usize) {
    let Some(cores) = cores_near(device, Path::new("/")) else {
        return;
    };
    let mut set = CpuSet::new();
    for core in cores {
        if set.set(core).is_err() {
            return;
        }
    }
    // A container may forbid it; the rank runs all the same.
    let _ = sched_setaffinity(Pid::from_raw(0), &set);
}

fn cores_near(device: usize, root: &Path) -> Option<Vec<usize>> {
    let known = fs::read_dir(root.join("proc/driver/nvidia/gpus")).ok()?.flatten();
    let mut gpus: Vec<String> = known.filter(|entry| may_open(&entry.path(), root)).map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    gpus.sort();
    let node = fs::read_to_string(root.join("sys/bus/pci/devices").join(gpus.get(device)?).join("numa_node")).ok()?;
    // -1: the system does not know.
    let node: usize = node.trim().parse().ok()?;
    let nodes = root.join("sys/devices/system/node");
    if !nodes.join("node1").exists() {
        return None;
    }
    parse_list(&fs::read_to_string(nodes.join(format!("node{node}/cpulist"))).ok()?)
}

/// SLURM's control group (ConstrainDevices) leaves a task some of the GPUs that the driver lists, and these are numbered from 0. Asked
/// without opening: the first to open a GPU waits until it is set up. True where the driver does not tell which file it is.
fn may_open(gpu: &Path, root: &Path) -> bool {
    let told = fs::read_to_string(gpu.join("information")).unwrap_or_default();
    let minor = told.lines().find_map(|line| line.strip_prefix("Device Minor:"));
    minor.is_none_or(|minor| access(&root.join(format!("dev/nvidia{}", minor.trim())), AccessFlags::R_OK | AccessFlags::W_OK).is_ok())
}

/// `0-3,8` → 0 1 2 3 8
fn parse_list(text: &str) -> Option<Vec<usize>> {
    let mut found = Vec::new();
    for range in text.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        found.extend(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?);
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ranks_gpu_is_its_first() {
        assert_eq!(visible_devices(None, 4, 3).as_deref(), Some("3,0,1,2"));
        assert_eq!(visible_devices(Some("4,5"), 8, 1).as_deref(), Some("5,4"), "only what the environment allows");
        assert_eq!(visible_devices(None, 2, 3).as_deref(), Some("1,0"), "several ranks may share one");
        assert_eq!(visible_devices(Some(""), 8, 0), None);
    }

    #[test]
    fn a_gpu_is_counted_among_those_that_may_be_opened() {
        let machine = tempfile::tempdir().expect("a folder");
        let file = |path: &str, text: &str| {
            let path = machine.path().join(path);
            fs::create_dir_all(path.parent().expect("a folder's file")).and_then(|()| fs::write(path, text)).expect("written");
        };
        // In PCI order: minor 2 at node 0, minor 0 at node 1, minor 1 at node 0, and one that the driver says nothing of at node 1.
        for (bus, minor, node) in [("0a", "Device Minor: \t 2\n", 0), ("1b", "Model: \t H200\nDevice Minor: \t 0\n", 1), ("2c", "Device Minor: \t 1\n", 0), ("3d", "", 1)] {
            file(&format!("proc/driver/nvidia/gpus/0000:{bus}:00.0/information"), minor);
            file(&format!("sys/bus/pci/devices/0000:{bus}:00.0/numa_node"), &format!("{node}\n"));
        }
        (0..2).for_each(|node| file(&format!("sys/devices/system/node/node{node}/cpulist"), &format!("{node}\n")));
        let nodes = || [0, 1, 2, 3].map(|device| cores_near(device, machine.path()).map(|cores| cores[0]));
        (0..3).for_each(|minor| file(&format!("dev/nvidia{minor}"), ""));
        assert_eq!(nodes(), [Some(0), Some(1), Some(0), Some(1)]);
        // As if closed to this task.
        fs::remove_file(machine.path().join("dev/nvidia2")).expect("removed");
        assert_eq!(nodes(), [Some(1), Some(0), Some(1), None]);
    }

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(parse_list("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_list(""), None);
    }
}
