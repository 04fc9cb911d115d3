//! Signs of life from every host of a run over connections of their own, both ways, once a second.
//!
//! mpirun notices a link that is cut only while it has nothing to send; otherwise it waits for a quarter of an hour, and
//! ignores a TERM meanwhile. So each host's first rank starts a small process beside it that talks to the launcher. When the
//! launcher hears nothing of a host, the host is lost. When the host hears nothing of the launcher, it ends its own ranks:
//! nobody else could.
use crate::gate::{self, Connection};
use crate::processes::{descendants, name, parent};
use crate::wire::{self, Receiver, Secret, Sender};
use anyhow::{Context, Result};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the ranks' processes find where and how to report: its value holds a key, and never stands on a command line.
pub const VARIABLE: &str = "TIEFSEE_HEARTBEAT";
/// First argument that makes this executable a host's sign of life.
pub const BEAT: &str = "@beat";
const PERIOD: Duration = Duration::from_secs(1);
/// A host whose launcher cannot be reached at first runs without: perhaps a firewall is between them.
const TRIES: usize = 5;

/// Both ways.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Beat {
    attempt: usize,
    /// The host's first rank.
    rank: usize,
}

/// The launcher's side.
pub struct Heartbeats {
    secret: Secret,
    addresses: Vec<SocketAddr>,
    limit: Duration,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    attempt: usize,
    /// By the host's first rank.
    last: BTreeMap<usize, Instant>,
}

impl Heartbeats {
    /// `interface`: where the hosts can reach us, a name or a subnet; None: any.
    pub fn listen(interface: Option<&str>, limit: Duration) -> Result<Self> {
        let listener = TcpListener::bind("[::]:0").or_else(|_| TcpListener::bind("0.0.0.0:0")).context("cannot listen for heartbeats")?;
        let (secret, heard) = (Secret::random(), Arc::new(Mutex::new(Heard::default())));
        let shared = heard.clone();
        let port = gate::open(listener, secret.clone(), move |connection| hear(&shared, connection))?.port();
        let addresses = own_addresses(interface)?.into_iter().map(|address| SocketAddr::new(address, port)).collect();
        Ok(Heartbeats { secret, addresses, limit, heard })
    }

    /// Signs of earlier attempts no longer count.
    pub fn begin(&self, attempt: usize) {
        *self.heard.lock().expect("a listener does not panic") = Heard { attempt, last: BTreeMap::new() };
    }

    /// The value of [`VARIABLE`].
    pub fn told(&self, attempt: usize) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(SocketAddr::to_string).collect();
        format!("{attempt} {} {} {}", self.limit.as_secs_f64(), self.secret.to_hex(), addresses.join(","))
    }

    /// The first rank of a host that has been silent for too long.
    pub fn silent(&self, now: Instant) -> Option<(usize, Duration)> {
        let heard = self.heard.lock().expect("a listener does not panic");
        let quiet = heard.last.iter().map(|(rank, last)| (*rank, now.saturating_duration_since(*last)));
        quiet.filter(|(_, quiet)| *quiet > self.limit).max_by_key(|(_, quiet)| *quiet)
    }
}

fn hear(heard: &Mutex<Heard>, (_, mut sender, mut receiver): Connection) {
    let mut known = None;
    loop {
        let beat = receiver.receive::<Beat>(PERIOD);
        let mut heard = heard.lock().expect("a listener does not panic");
        match beat {
            Ok(Some(beat)) if beat.attempt == heard.attempt => {
                known = Some(beat);
                heard.last.insert(beat.rank, Instant::now());
            }
            // Of an attempt that is over.
            Ok(Some(_)) => return,
            Ok(None) if known.is_none_or(|beat| beat.attempt == heard.attempt) => continue,
            // The host's ranks have ended, and say so: what becomes of that is mpirun's to tell.
            Err(_) | Ok(None) => {
                if let Some(beat) = known.filter(|beat| beat.attempt == heard.attempt) {
                    heard.last.remove(&beat.rank);
                }
                return;
            }
        }
        drop(heard);
        if let Some(beat) = known {
            // If it cannot be told, it will not answer either.
            let _ = sender.send(&beat);
        }
    }
}

/// All that others may reach.
fn own_addresses(interface: Option<&str>) -> Result<Vec<IpAddr>> {
    let mut found = Vec::new();
    for entry in getifaddrs().context("cannot list the network's addresses")? {
        let Some(storage) = entry.address else {
            continue;
        };
        let v4 = storage.as_sockaddr_in().map(|address| IpAddr::V4(address.ip()));
        // Link-local ones would need their interface's name.
        let v6 = storage.as_sockaddr_in6().map(|address| address.ip()).filter(|address| !address.is_unicast_link_local()).map(IpAddr::V6);
        let Some(address) = v4.or(v6) else { continue };
        let wanted = match interface {
            Some(wanted) => wanted.split(',').any(|wanted| wanted == entry.interface_name || within(address, wanted)),
            None => !entry.flags.contains(InterfaceFlags::IFF_LOOPBACK),
        };
        if wanted && entry.flags.contains(InterfaceFlags::IFF_UP) {
            found.push(address);
        }
    }
    Ok(found)
}

/// 10.1.2.3 is within 10.1.0.0/16.
fn within(address: IpAddr, subnet: &str) -> bool {
    let parsed = subnet.split_once('/').and_then(|(base, bits)| Some((base.parse::<IpAddr>().ok()?, bits.parse::<u32>().ok()?)));
    match (address, parsed) {
        (IpAddr::V4(address), Some((IpAddr::V4(base), bits @ 0..=32))) => (u64::from(address.to_bits()) ^ u64::from(base.to_bits())) >> (32 - bits) == 0,
        _ => false,
    }
}

/// The host's side, a process of its own that ends with the rank that started it.
pub fn beat(told: &str) -> Result<()> {
    let rank = getppid();
    let daemon = parent(rank.as_raw() as u32).context("the rank has no parent")?;
    set_pdeathsig(Signal::SIGKILL)?;
    let words: Vec<&str> = told.split(' ').collect();
    let [attempt, limit, key, addresses, first_rank] = words[..] else { anyhow::bail!("{VARIABLE} is not what a launcher writes") };
    let beat = Beat { attempt: attempt.parse()?, rank: first_rank.parse()? };
    let (limit, secret) = (Duration::from_secs_f64(limit.parse()?), Secret::from_hex(key)?);
    let addresses: Vec<SocketAddr> = addresses.split(',').filter_map(|address| address.parse().ok()).collect();
    let Some(connection) = first_to_answer(&addresses, &secret) else {
        return Ok(());
    };
    talk(connection, beat, limit, rank);
    end_the_job(daemon);
    Ok(())
}

fn first_to_answer(addresses: &[SocketAddr], secret: &Secret) -> Option<(Sender, Receiver)> {
    for _ in 0..TRIES {
        if let Ok(connection) = wire::connect(addresses, secret) {
            return Some(connection);
        }
        std::thread::sleep(PERIOD);
    }
    None
}

/// Until nothing has been heard for `limit`, or the rank is gone.
fn talk((mut sender, mut receiver): (Sender, Receiver), beat: Beat, limit: Duration, rank: Pid) {
    let (mut heard, mut open) = (Instant::now(), true);
    while heard.elapsed() <= limit && getppid() == rank {
        // A launcher that was killed closes the connection; its guard has some seconds to end things in order.
        open = open && sender.send(&beat).is_ok();
        if open {
            match receiver.receive::<Beat>(PERIOD) {
                Ok(Some(_)) => heard = Instant::now(),
                Ok(None) => continue,
                Err(_) => open = false,
            }
        }
        std::thread::sleep(PERIOD);
    }
}

/// The daemon that started this host's ranks, and all that it started. On the launcher's own host that is mpirun, which
/// belongs to the guard.
fn end_the_job(daemon: u32) {
    if !matches!(name(daemon).as_deref(), Some("orted" | "prted")) {
        return;
    }
    let all = descendants(daemon).into_iter().filter(|pid| *pid != std::process::id()).chain([daemon]);
    for pid in all {
        // One that is already gone is what we want.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subnets_hold_their_addresses() {
        let address: IpAddr = "10.1.2.3".parse().expect("an address");
        assert!(within(address, "10.1.0.0/16") && within(address, "0.0.0.0/0") && within(address, "10.1.2.3/32"));
        assert!(!within(address, "10.2.0.0/16") && !within(address, "eth0") && !within(address, "10.1.0.0/33"));
    }

    #[test]
    fn a_host_is_silent_once_nothing_comes_and_gone_once_it_says_so() {
        let limit = Duration::from_secs(3);
        let beats = Heartbeats::listen(Some("lo"), limit).expect("a port");
        beats.begin(2);
        let connect = |attempt: usize, rank: usize| {
            let (mut sender, mut receiver) = first_to_answer(&beats.addresses, &beats.secret).expect("accepted");
            sender.send(&Beat { attempt, rank }).expect("sent");
            let answer = receiver.receive::<Beat>(Duration::from_secs(5));
            (sender, receiver, answer.ok().flatten().map(|beat| beat.rank))
        };
        let host = connect(2, 4);
        assert_eq!(host.2, Some(4), "it answers");
        assert_eq!(connect(1, 0).2, None, "an attempt that is over has no say");
        let now = Instant::now();
        assert!(beats.silent(now).is_none());
        assert_eq!(beats.silent(now + 2 * limit).expect("silent").0, 4);
        host.0.close();
        let start = Instant::now();
        while beats.silent(now + 2 * limit).is_some() {
            assert!(start.elapsed() < Duration::from_secs(20), "its end was not seen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}
