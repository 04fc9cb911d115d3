//! What a rank's process does before it becomes `tiefsee`: `tiefsee-launch @rank WORDS PROGRAM…`, with words by comma.
use crate::binding::{bind_near, visible_devices};
use crate::environment::{NAME, OWN, RankPlace, devices, raise_file_limit};
use crate::guard::{CANNOT_START, become_program, tie};
use crate::heartbeat::{BEAT, VARIABLE};
use nix::sys::signal::Signal;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

/// First argument that makes this executable a rank.
pub const RANK: &str = "@rank";

/// What a rank may be asked for; the words stand in the command line, for `--dry-run` to show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    /// Ends with mpirun or its daemon: without, a rank whose daemon is killed would wait in a collective for ever.
    Tied,
    /// Device 0 is its own GPU, and it runs on the cores beside it.
    Gpu,
    /// The host's first rank starts its sign of life.
    Beat,
}

impl Word {
    pub fn text(self) -> &'static str {
        match self {
            Word::Tied => "tied",
            Word::Gpu => "gpu",
            Word::Beat => "beat",
        }
    }
}

/// Becomes the program. Returns only if it cannot.
pub fn rank(words: &str, program: &[String]) -> u8 {
    let asked = |word: Word| words.split(',').any(|text| text == word.text());
    if asked(Word::Tied)
        && let Err(error) = tie(Signal::SIGKILL)
    {
        eprintln!("tiefsee-launch: cannot tie a rank to its parent: {error}");
        return CANNOT_START;
    }
    // Each rank speaks to each other, over a socket where there is no better network.
    raise_file_limit();
    let place = RankPlace::read();
    if asked(Word::Beat) && place.local == 0 {
        start_beat(place.rank);
    }
    let mut set = Vec::new();
    if asked(Word::Gpu) {
        // Of the environment no more: a rank of many must not ask SLURM or mpirun.
        let (gpus, visible) = devices();
        if let Some(devices) = visible_devices(visible.as_deref(), gpus, place.local) {
            if let Some(own) = devices.split(',').next().and_then(|own| own.parse().ok()) {
                bind_near(own);
            }
            set = vec!["env".to_string(), "CUDA_DEVICE_ORDER=PCI_BUS_ID".to_string(), format!("CUDA_VISIBLE_DEVICES={devices}")];
        }
    }
    set.extend(program.iter().cloned());
    become_program(&set)
}

/// In the background, with nothing of the rank's own: mpirun waits for the end of its output.
fn start_beat(rank: usize) {
    let Ok(told) = std::env::var(VARIABLE) else {
        return;
    };
    let mut command = Command::new(OWN);
    command.arg0(NAME).arg(BEAT).env(VARIABLE, format!("{told} {rank}")).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // Not to be taken for a rank, and not of its process group: mpirun sends the order to checkpoint to all of that.
    command.process_group(0);
    if let Err(error) = command.env_remove("OMPI_COMM_WORLD_RANK").env_remove("PMIX_RANK").spawn() {
        eprintln!("tiefsee-launch: no heartbeat: {error}");
    }
}
