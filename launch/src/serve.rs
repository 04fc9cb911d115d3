//! A run without ssh, on every node but the first: registers at the rendezvous and runs what mpirun asks for there.
use crate::guard::{Guarded, Order};
use crate::incidents::say;
use crate::outcome::{Class, Outcome, STOPPED_LATE, USAGE};
use crate::output::Output;
use crate::rendezvous::{FromNode, PERIOD, ToNode};
use crate::wire::{self, Receiver, Secret, Sender};
use anyhow::{Context, Result};
use signal_hook::iterator::Signals;
use std::collections::BTreeMap;
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

const TICK: Duration = Duration::from_millis(50);
/// mpirun's daemon ends its ranks in order within this time; then everything is killed.
const FAREWELL: Duration = Duration::from_secs(10);

pub struct Node<'a> {
    pub number: usize,
    pub host: String,
    pub rdzv: &'a str,
    pub secret: Secret,
    /// Silence of node 0 after which it counts as lost.
    pub silence: Duration,
    /// How long node 0 is looked for, at the start and after it was lost.
    pub search: Duration,
}

struct Job {
    guarded: Guarded,
    output: Output,
    asked_at: Option<Instant>,
}

/// Why a connection is over.
enum Over {
    Code(u8),
    Lost(String),
}

/// The exit code that node 0 gives, or one for a node that never found or lost it.
pub fn serve(node: &Node, mut signals: Signals) -> Result<u8> {
    let mut since = Instant::now();
    let (mut last, mut requests) = (String::new(), 0);
    while since.elapsed() < node.search {
        if signals.pending().count() > 0 {
            return Ok(STOPPED_LATE);
        }
        match join(node) {
            Ok(Ok((sender, receiver))) => match run_what_is_asked(node, (sender, receiver), &mut signals, &mut requests)? {
                Over::Code(code) => return Ok(code),
                Over::Lost(why) if requests > 0 => {
                    say(&format!("node 0 at {} is lost ({why}) after this node was asked to stop: its processes here are ended", node.rdzv));
                    return Ok(STOPPED_LATE);
                }
                Over::Lost(why) => {
                    say(&format!("node 0 at {} is lost ({why}): its processes here are ended; looking for it again", node.rdzv));
                    since = Instant::now();
                }
            },
            Ok(Err(refusal)) => {
                say(&format!("node 0 at {} refused this node: {refusal}", node.rdzv));
                // It may not have noticed yet that an earlier one of this number is gone.
                if !refusal.ends_with("here already") {
                    return Ok(USAGE);
                }
            }
            Err(error) => {
                let words = format!("{error:#}");
                if words != last {
                    say(&format!("cannot register: {words}; trying for {:.0} s", node.search.as_secs_f64()));
                    last = words;
                }
            }
        }
        std::thread::sleep(PERIOD);
    }
    say(&format!("node 0 at {} was not found within {:.0} s", node.rdzv, node.search.as_secs_f64()));
    Ok(lost())
}

fn lost() -> u8 {
    Outcome::new(Class::LinkLost, "").exit_code()
}

/// A connection, or node 0's reason against one.
fn join(node: &Node) -> Result<Result<(Sender, Receiver), String>> {
    let addresses: Vec<SocketAddr> = node.rdzv.to_socket_addrs().with_context(|| format!("--rdzv {}", node.rdzv))?.collect();
    let (mut sender, mut receiver) = wire::connect(&addresses, &node.secret).with_context(|| format!("--rdzv {}", node.rdzv))?;
    sender.send(&FromNode::Hello { node: node.number, host: node.host.clone() })?;
    match receiver.receive(Duration::from_secs(5))? {
        Some(ToNode::Welcome { name }) => say(&format!("registered at {} as {name}", node.rdzv)),
        Some(ToNode::Refused { why }) => return Ok(Err(why)),
        _ => anyhow::bail!("{} does not answer", node.rdzv),
    }
    Ok(Ok((sender, receiver)))
}

/// `requests`: to stop, to this node.
fn run_what_is_asked(node: &Node, (mut sender, mut receiver): (Sender, Receiver), signals: &mut Signals, requests: &mut usize) -> Result<Over> {
    let mut jobs: BTreeMap<u64, Job> = BTreeMap::new();
    let (mut heard, mut told) = (Instant::now(), Instant::now());
    let mut over = None;
    while over.is_none() {
        match receiver.receive::<ToNode>(TICK) {
            Ok(Some(message)) => {
                heard = Instant::now();
                match message {
                    ToNode::Run { id, command } => drop(jobs.insert(id, start(&command)?)),
                    ToNode::End { id } => jobs.get_mut(&id).into_iter().for_each(Job::end),
                    ToNode::Over { code } => over = Some(Over::Code(code)),
                    ToNode::Alive | ToNode::Welcome { .. } | ToNode::Refused { .. } => {}
                }
            }
            Ok(None) if heard.elapsed() > node.silence => over = Some(Over::Lost(format!("silent for {:.0} s", heard.elapsed().as_secs_f64()))),
            Ok(None) => {}
            Err(error) => over = Some(Over::Lost(format!("{error:#}"))),
        }
        let (codes, stuck) = ended(&mut jobs)?;
        for (id, code) in codes {
            // If it cannot be told, the next receive fails too.
            let _ = sender.send(&FromNode::Ended { id, code });
        }
        // Node 0 shall go on without this one.
        if stuck {
            over = Some(Over::Code(lost()));
        }
        if told.elapsed() >= PERIOD {
            told = Instant::now();
            let _ = sender.send(&FromNode::Alive);
        }
        if signals.pending().count() > 0 {
            *requests += 1;
            match *requests {
                1 => {
                    say("asked to stop: node 0 is told");
                    let _ = sender.send(&FromNode::Stop);
                }
                _ => over = Some(Over::Code(STOPPED_LATE)),
            }
        }
    }
    // The run's own end leaves the daemons a moment; a lost node 0 has nothing to wait for.
    let mut patience = if matches!(over, Some(Over::Code(_))) { FAREWELL } else { Duration::ZERO };
    let start = Instant::now();
    while !jobs.is_empty() {
        if start.elapsed() >= patience {
            jobs.values_mut().for_each(|job| job.guarded.order(Order::Kill));
            patience += PERIOD;
        }
        if ended(&mut jobs)?.1 && matches!(over, Some(Over::Lost(_))) {
            over = Some(Over::Code(lost()));
        }
        std::thread::sleep(TICK);
    }
    Ok(over.expect("the loop's end"))
}

fn start(command: &str) -> Result<Job> {
    let shell = ["/bin/sh".to_string(), "-c".to_string(), command.to_string()];
    let (guarded, stdout, stderr) = Guarded::spawn(None, &shell, &[]).context("cannot start the guard")?;
    // Where its ranks' output carries tags, mpirun has put them there: a daemon's own has none.
    Ok(Job { guarded, output: Output::read(0, None, channel().0, stdout, stderr), asked_at: None })
}

impl Job {
    fn end(&mut self) {
        self.guarded.order(Order::Term);
        self.asked_at = Some(Instant::now());
    }
}

/// Codes of those that have ended, and whether one left processes here that nobody can end; those that were asked to end and do
/// not are killed.
fn ended(jobs: &mut BTreeMap<u64, Job>) -> Result<(Vec<(u64, i32)>, bool)> {
    let (mut codes, mut stuck) = (Vec::new(), false);
    for (id, job) in jobs.iter_mut() {
        if let Some(code) = job.guarded.try_wait()? {
            codes.push((*id, code));
        } else if job.asked_at.is_some_and(|then| then.elapsed() > FAREWELL) {
            job.guarded.order(Order::Kill);
        }
    }
    for (id, _) in &codes {
        if let Some(job) = jobs.remove(id) {
            stuck |= job.output.finish().stuck.is_some();
        }
    }
    Ok((codes, stuck))
}
