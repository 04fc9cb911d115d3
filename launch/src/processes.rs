//! The process table, as far as our own descendants go.
use std::fs;
use std::path::Path;

/// Every living descendant of `ancestor`, parents first.
pub fn descendants(ancestor: u32) -> Vec<u32> {
    let mut found = children(ancestor);
    let mut next = 0;
    while next < found.len() {
        found.extend(children(found[next]));
        next += 1;
    }
    found
}

fn children(parent: u32) -> Vec<u32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{parent}/task")) else {
        return Vec::new();
    };
    let of_task = |task: fs::DirEntry| fs::read_to_string(task.path().join("children")).unwrap_or_default();
    tasks.flatten().flat_map(|task| of_task(task).split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()).collect()
}

/// The rank that a process was started as, by Open MPI's or PMIx's word.
pub fn rank(pid: u32) -> Option<usize> {
    let environ = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let value = |name: &str| environ.split(|&byte| byte == 0).find_map(|pair| std::str::from_utf8(pair).ok()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
    value("OMPI_COMM_WORLD_RANK").or_else(|| value("PMIX_RANK"))
}

pub fn name(pid: u32) -> Option<String> {
    Some(fs::read_to_string(format!("/proc/{pid}/comm")).ok()?.trim().to_string())
}

pub fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")?.trim().parse().ok())
}

/// State letter of a process: of the first of its threads that lives, for one that stands in the kernel keeps all that have ended.
pub fn state(pid: u32) -> Option<char> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten();
    let states = tasks.filter_map(|task| Some(stat(&task.path())?.0));
    states.min_by_key(|state| *state == 'Z')
}

/// State letter and CPU ticks of a process.
pub fn activity(pid: u32) -> Option<(char, u64)> {
    stat(Path::new(&format!("/proc/{pid}")))
}

fn stat(process: &Path) -> Option<(char, u64)> {
    let stat = fs::read_to_string(process.join("stat")).ok()?;
    // The name in parentheses may hold anything; fields count from behind it.
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    Some((fields.first()?.chars().next()?, fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?))
}
