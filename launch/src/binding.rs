//! Which GPU is a rank's, and the processor cores beside it.
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
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

/// Keeps this process, and what it becomes, on the cores of the NUMA node that GPU number `device` (in PCI order) hangs at.
/// Does nothing where the system does not tell, or where only one node is.
pub fn bind_near(device: usize) {
    let Some(cores) = cores_near(device) else {
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

fn cores_near(device: usize) -> Option<Vec<usize>> {
    let mut gpus: Vec<String> = fs::read_dir("/proc/driver/nvidia/gpus").ok()?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    gpus.sort();
    let node = fs::read_to_string(Path::new("/sys/bus/pci/devices").join(gpus.get(device)?).join("numa_node")).ok()?;
    // -1: the system does not know.
    let node: usize = node.trim().parse().ok()?;
    if !Path::new("/sys/devices/system/node/node1").exists() {
        return None;
    }
    parse_list(&fs::read_to_string(format!("/sys/devices/system/node/node{node}/cpulist")).ok()?)
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
    fn lists_of_cores_are_read() {
        assert_eq!(parse_list("0-2,8\n"), Some(vec![0, 1, 2, 8]));
        assert_eq!(parse_list(""), None);
    }
}
