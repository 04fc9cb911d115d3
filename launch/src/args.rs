//! The command line, and the exit codes' one list for people.
use clap::{Parser, ValueEnum};
use std::net::SocketAddrV6;
use std::path::PathBuf;

/// Starts a run on every rank, watches it, and restarts it from its newest checkpoint.
#[derive(Clone, Debug, Parser)]
#[command(name = "tiefsee-launch", version, after_help = AFTER_HELP)]
pub struct Args {
    /// Hosts to run on (default: SLURM's allocation, the hosts given, or this one). MIN:MAX also goes on with fewer, where
    /// the run's batches divide. Hosts beyond it are spare: one takes the place of a host that failed twice within the restarts' window.
    #[arg(long, value_parser = parse_nodes)]
    pub nnodes: Option<Nodes>,
    /// Ranks on each host: a number, `gpu` (one each), `cpu` (one a core) or `auto`: a hostfile's slots, but no more than GPUs where
    /// there are any; else SLURM's --ntasks-per-node, but not with --standalone; else one a GPU; else 1. GPUs and cores are this host's.
    #[arg(long, default_value = "auto", value_parser = parse_ranks)]
    pub nproc_per_node: Ranks,
    /// Hosts, by comma; the ssh names.
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["hostfile", "standalone"])]
    pub hosts: Vec<String>,
    /// A file with one host a line: `name`, or `name slots=8`, the most ranks it takes, which are the same for all. A host of several
    /// lines, as in $PBS_NODEFILE, takes as many.
    #[arg(long, conflicts_with = "standalone")]
    pub hostfile: Option<PathBuf>,
    /// This host alone, also inside a SLURM allocation.
    #[arg(long)]
    pub standalone: bool,
    /// What starts the ranks; auto takes srun inside an allocation where PMIx is there, else mpirun.
    #[arg(long, value_enum, default_value = "auto")]
    pub launcher: Launcher,
    /// Network between hosts, as Open MPI takes it: `eth0` or `10.0.0.0/24`.
    #[arg(long)]
    pub interface: Option<String>,
    /// What mpirun starts its remote daemons with, in place of ssh.
    #[arg(long)]
    pub rsh_agent: Option<String>,
    /// Without ssh: the same command is run on every node, with its number here; 0 is the one that supervises.
    #[arg(long, requires = "rdzv", conflicts_with_all = ["hosts", "hostfile", "standalone", "rsh_agent"])]
    pub node_rank: Option<usize>,
    /// Where node 0 listens and the others register; an IPv6 address in brackets.
    #[arg(long, requires_all = ["node_rank", "nnodes"], value_name = "HOST:PORT", value_parser = parse_address)]
    pub rdzv: Option<String>,
    /// A file with the secret that nodes must share; without it, the variable TIEFSEE_SECRET.
    #[arg(long, requires = "rdzv", value_name = "FILE")]
    pub secret_file: Option<PathBuf>,
    /// One more option for mpirun or srun; may be repeated.
    #[arg(long = "pass", allow_hyphen_values = true, value_name = "OPTION")]
    pub passed: Vec<String>,

    /// Restarts after failures, at most so many within the window.
    #[arg(long, default_value_t = 3)]
    pub max_restarts: usize,
    /// Seconds after which a restart is forgotten.
    #[arg(long, default_value_t = 3600.0, value_parser = seconds)]
    pub restart_window: f64,
    /// Seconds before the first restart; doubles with each one in the window, up to a minute. Where a run that has worked came to no
    /// step, twenty times as long, up to five minutes: a file system or a host may need them to come back.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    pub back_off: f64,
    /// Go on with a run that RUN_DIR already holds, where the command says train: what a batch script wants.
    #[arg(long)]
    pub auto_resume: bool,

    /// Hung: no new step for so many median steps …
    #[arg(long, default_value_t = 20.0, value_parser = seconds)]
    pub hang_steps: f64,
    /// … and at least for so many seconds (a validation is no hang). 0: never.
    #[arg(long, default_value_t = 300.0, value_parser = seconds)]
    pub hang_floor: f64,
    /// Seconds that the ranks may wait for a checkpoint to be written or read. 0: no limit.
    #[arg(long, default_value_t = 3600.0, value_parser = seconds)]
    pub save_limit: f64,
    /// Seconds until the first step of a start. 0: no limit.
    #[arg(long, default_value_t = 1800.0, value_parser = seconds)]
    pub start_limit: f64,
    /// Seconds of silence after which a host, or the link to it, is lost. 0: only mpirun's own word counts.
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub heartbeat: f64,
    /// Seconds that ranks have to checkpoint after Ctrl-C, TERM, USR1 or HUP, before they are ended.
    #[arg(long, default_value_t = 100.0, value_parser = seconds)]
    pub grace: f64,
    /// Seconds between TERM and KILL.
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    pub kill_after: f64,

    /// Where rank-N.log (what each rank printed) goes; default RUN_DIR/log.
    #[arg(long)]
    pub log_dir: Option<PathBuf>,
    /// Print the command, where each rank runs and its GPU, and stop.
    #[arg(long)]
    pub dry_run: bool,
    /// The program that ranks run, in place of the `tiefsee` beside this one.
    #[arg(long)]
    pub program: Option<PathBuf>,

    /// train --config FILE [--set section.key=value] | resume RUN_DIR | any other tiefsee command, unsupervised
    #[arg(last = true, required = true)]
    pub command: Vec<String>,

    /// The most ranks on each host, by the hostfile's word.
    #[arg(skip)]
    pub slots: Option<usize>,
}

/// A world of at least and at most so many hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    pub least: usize,
    pub most: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ranks {
    Auto,
    Gpu,
    Cpu,
    Number(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Launcher {
    Auto,
    Mpirun,
    Srun,
}

const AFTER_HELP: &str = "\
Signals: Ctrl-C, TERM, USR1 and HUP let every rank checkpoint, then exit with 75. A second one ends the ranks at once.

Exit codes:
  0   the run is finished
  75  stopped on request, with a checkpoint: start the same command again (please requeue)
  2   the command line or its config is wrong, or the run directory does not fit it
  10  a rank ended with a code that is none of these
  11  a rank was killed by a signal
  12  a rank ran out of memory
  13  tiefsee ended with an error, which is printed
  14  a host or the link to it was lost, or processes there do not end
  15  hung: no rank made a step
  16  the ranks could not be started, or the run directory could not be taken
  17  another launcher is at work in this run directory; one on another host is waited for first, as that may be gone
  18  stopped on request, or pre-empted by SLURM, but the ranks did not checkpoint in time; an older checkpoint may be there
  19  what the ranks held in memory was damaged, and no copy of that step was left
  20  too many steps in a row were skipped (guard.max_skipped): a restart would skip them again
For 10 to 15 and 19, --max-restarts were used up, or a restart could not help.

Examples:
  tiefsee-launch --standalone --nproc-per-node 2 -- train --config configs/run/quickstart.toml
  tiefsee-launch --hosts node1,node2 --nproc-per-node 8 -- resume runs/a
  tiefsee-launch --hosts n1,n2,n3 --nnodes 2 -- resume runs/a          # n3 is spare
  tiefsee-launch --nnodes 2 --node-rank 0 --rdzv n1:29400 --secret-file ~/.tiefsee-secret -- resume runs/a    # on n1
  tiefsee-launch --nnodes 2 --node-rank 1 --rdzv n1:29400 --secret-file ~/.tiefsee-secret -- resume runs/a    # on n2";

fn parse_nodes(text: &str) -> Result<Nodes, String> {
    let (least, most) = text.split_once(':').unwrap_or((text, text));
    match (least.parse(), most.parse()) {
        (Ok(least), Ok(most)) if 1 <= least && least <= most => Ok(Nodes { least, most }),
        _ => Err("a number from 1, or MIN:MAX".to_string()),
    }
}

fn parse_ranks(text: &str) -> Result<Ranks, String> {
    match text {
        "auto" => Ok(Ranks::Auto),
        "gpu" => Ok(Ranks::Gpu),
        "cpu" => Ok(Ranks::Cpu),
        number => match number.parse() {
            Ok(0) | Err(_) => Err("a positive number, gpu, cpu or auto".to_string()),
            Ok(number) => Ok(Ranks::Number(number)),
        },
    }
}

/// Whether the host is there shows later, and may be so only for a while.
fn parse_address(text: &str) -> Result<String, String> {
    let port = |port: &str| port.parse::<u16>().is_ok_and(|port| port > 0);
    let name = |host: &str| !host.is_empty() && !host.contains(|letter: char| letter.is_whitespace() || "[]:/".contains(letter));
    let right = match text.starts_with('[') {
        true => text.parse::<SocketAddrV6>().is_ok_and(|address| address.port() > 0),
        false => text.split_once(':').is_some_and(|(host, number)| name(host) && port(number)),
    };
    if right { Ok(text.to_string()) } else { Err("HOST:PORT, such as n1:29400, 10.0.0.1:29400 or [fd00::1]:29400".to_string()) }
}

fn seconds(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|value| (0.0..=1e9).contains(value)).ok_or_else(|| "a number from 0 to 1e9".to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rendezvous_is_a_host_and_a_port() {
        let parsed = |options: &str| {
            let line = format!("tiefsee-launch --node-rank 1 {options} -- resume a");
            Args::try_parse_from(line.split_whitespace()).map(|args| args.rdzv).map_err(|error| (error.exit_code(), error.to_string()))
        };
        for address in ["n1:29400", "n1.site:1", "10.0.0.1:29400", "[fd00::1]:29400", "[fe80::1%2]:65535"] {
            assert_eq!(parsed(&format!("--nnodes 2 --rdzv {address}")), Ok(Some(address.to_string())));
        }
        for address in ["n1", "n1:", ":29400", "n1:port", "n1:0", "n1:65536", "fd00::1", "fd00::1:29400", "[fd00::1]", "[fd00::1]:0", "[n1]:29400", "http://n1:29400"] {
            let (code, words) = parsed(&format!("--nnodes 2 --rdzv {address}")).expect_err(address);
            assert!(code == 2 && words.contains("HOST:PORT, such as n1:29400"), "{address}: {code} {words}");
        }
        let (code, words) = parsed("--rdzv n1:29400").expect_err("how many are waited for?");
        assert!(code == 2 && words.contains("--nnodes"), "{code} {words}");
    }
}
