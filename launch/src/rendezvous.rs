//! A run without ssh, on node 0: the other nodes' launchers register here, and run what mpirun asks of its agent.
//!
//! ```text
//! node 0                                              node 1
//! tiefsee-launch ◀──────── gate.rs, wire.rs ─────────▶ tiefsee-launch (serve.rs)
//!  ├ guard ─ mpirun ─ @remote ─▶ socket ─▶ Run ───────▶ └ guard ─ orted ─ ranks
//! ```
//!
//! The socket stands in a folder that only this user can enter. The port starts processes on the nodes, so nobody is heard
//! there without the secret.
use crate::gate::{self, Connection};
use crate::incidents::say;
use crate::remote::Asked;
use crate::wire::{Secret, Sender};
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender as Answers, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

/// Both sides say that they live.
pub const PERIOD: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(100);
/// Until a node that was let in says which it is.
const HELLO: Duration = Duration::from_secs(5);
/// Bytes of TMPDIR with which a socket in a folder there has a path below the system's 108.
const LONGEST: usize = 76;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum ToNode {
    Alive,
    /// You are in, under this name.
    Welcome {
        name: String,
    },
    Refused {
        why: String,
    },
    /// A shell's command.
    Run {
        id: u64,
        command: String,
    },
    End {
        id: u64,
    },
    /// The run is over, and how.
    Over {
        code: u8,
    },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum FromNode {
    Alive,
    Hello {
        node: usize,
        host: String,
    },
    Ended {
        id: u64,
        code: i32,
    },
    /// Somebody wants the run to stop.
    Stop,
}

/// Dropping it removes the socket; connections end with the process.
pub struct Rendezvous {
    shared: Arc<Shared>,
    folder: tempfile::TempDir,
}

struct Shared {
    nodes: usize,
    /// Silence of a node that counts as its loss.
    limit: Duration,
    state: Mutex<State>,
    next: AtomicU64,
}

#[derive(Default)]
struct State {
    members: BTreeMap<usize, Member>,
    /// Names of members that are gone, since somebody last asked.
    lost: Vec<String>,
    /// Members' requests to stop that nobody has taken yet.
    stops: usize,
    /// Who leaves now, may.
    over: bool,
}

struct Member {
    name: String,
    sender: Sender,
    /// Who waits for the end of which command.
    waiting: BTreeMap<u64, Answers<i32>>,
}

/// Where node 0 listens. Debian gives a host's own name a loopback address, perhaps beside its own, where no other node comes to.
fn reachable(address: &str, candidates: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let (host, _) = address.rsplit_once(':').unwrap_or((address, ""));
    let meant = host == "localhost" || host.trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
    match candidates.first() {
        Some(first) if !meant && candidates.iter().any(|candidate| candidate.ip().is_loopback()) => {
            [IpAddr::from(Ipv6Addr::UNSPECIFIED), Ipv4Addr::UNSPECIFIED.into()].map(|every| SocketAddr::new(every, first.port())).to_vec()
        }
        _ => candidates,
    }
}

impl Rendezvous {
    /// `own`: this host's name. `nodes`: at most so many, this one included.
    pub fn listen(address: &str, secret: Secret, own: &str, nodes: usize, limit: Duration) -> Result<Self> {
        let candidates = reachable(address, address.to_socket_addrs().with_context(|| format!("--rdzv {address}"))?.collect());
        let listener = TcpListener::bind(&candidates[..]).with_context(|| format!("node 0 cannot listen at --rdzv {address}"))?;
        let shared = Arc::new(Shared { nodes, limit, state: Mutex::default(), next: AtomicU64::new(0) });
        let folder = socket_folder(&std::env::temp_dir()).context("cannot make a folder for the agents' socket")?;
        let agents = UnixListener::bind(socket(&folder)).context("cannot make the agents' socket")?;
        let (of_gate, own) = (shared.clone(), own.to_string());
        gate::open(listener, secret, move |connection| member(&of_gate, &own, connection))?;
        let of_agents = shared.clone();
        thread::spawn(move || {
            for stream in agents.incoming().flatten() {
                let shared = of_agents.clone();
                thread::spawn(move || agent(&shared, &stream));
            }
        });
        Ok(Rendezvous { shared, folder })
    }

    pub fn socket(&self) -> PathBuf {
        socket(&self.folder)
    }

    /// Names of the nodes that are here, in order; without node 0.
    pub fn names(&self) -> Vec<String> {
        self.shared.state().members.values().map(|member| member.name.clone()).collect()
    }

    /// A node that is gone since the last call.
    pub fn lost(&self) -> Option<String> {
        self.shared.state().lost.pop()
    }

    /// What was lost before a start is no loss of it.
    pub fn forget_lost(&self) {
        self.shared.state().lost.clear();
    }

    pub fn stops(&self) -> usize {
        std::mem::take(&mut self.shared.state().stops)
    }

    /// Tells every node that the run is over.
    pub fn over(&self, code: u8) {
        let mut state = self.shared.state();
        state.over = true;
        for member in state.members.values_mut() {
            // A node that is gone finds out by itself.
            let _ = member.sender.send(&ToNode::Over { code });
        }
        drop(state);
        // So that it is read before the connection's end.
        thread::sleep(TICK);
    }
}

/// In `temporary`, unless the socket's path would be too long there for the system, or have a blank, where mpirun would cut it.
fn socket_folder(temporary: &Path) -> std::io::Result<tempfile::TempDir> {
    let path = temporary.as_os_str().as_encoded_bytes();
    let fits = path.len() <= LONGEST && !path.iter().any(u8::is_ascii_whitespace);
    tempfile::Builder::new().prefix("tiefsee-launch-").tempdir_in(if fits { temporary } else { Path::new("/tmp") })
}

fn socket(folder: &tempfile::TempDir) -> PathBuf {
    folder.path().join("agents")
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no thread panics with it")
    }

    /// Takes the node in, or says why not.
    fn welcome(&self, own: &str, node: usize, host: &str, mut sender: Sender) -> Result<()> {
        let mut state = self.state();
        let refusal = if node == 0 || node >= self.nodes {
            Some(format!("--node-rank {node}, but node 0 counts {} nodes", self.nodes))
        } else if state.members.contains_key(&node) {
            Some(format!("--node-rank {node} is here already"))
        } else {
            None
        };
        if let Some(why) = refusal {
            sender.send(&ToNode::Refused { why: why.clone() })?;
            anyhow::bail!(why);
        }
        // mpirun tells hosts apart by name.
        let taken = host == own || state.members.values().any(|member| member.name == host);
        let name = if taken { format!("{host}-{node}") } else { host.to_string() };
        sender.send(&ToNode::Welcome { name: name.clone() })?;
        say(&format!("node {node} is here: {name}"));
        state.members.insert(node, Member { name, sender, waiting: BTreeMap::new() });
        Ok(())
    }
}

/// One node, as long as it is there.
fn member(shared: &Shared, own: &str, (from, sender, mut receiver): Connection) {
    let node = match receiver.receive::<FromNode>(HELLO) {
        Ok(Some(FromNode::Hello { node, host })) => match shared.welcome(own, node, &host, sender) {
            Ok(()) => node,
            Err(error) => return say(&format!("refused {host} at {from}: {error:#}")),
        },
        _ => return,
    };
    let (mut heard, mut told) = (Instant::now(), Instant::now());
    let why = loop {
        let message = receiver.receive::<FromNode>(TICK);
        let mut state = shared.state();
        let State { members, stops, .. } = &mut *state;
        let member = members.get_mut(&node).expect("only this thread removes it");
        match message {
            Ok(Some(message)) => {
                heard = Instant::now();
                match message {
                    FromNode::Ended { id, code } => drop(member.waiting.remove(&id).map(|answers| answers.send(code))),
                    FromNode::Stop => *stops += 1,
                    FromNode::Alive | FromNode::Hello { .. } => {}
                }
            }
            Ok(None) if heard.elapsed() > shared.limit => {
                break format!("silent for {:.0} s", heard.elapsed().as_secs_f64());
            }
            Ok(None) => {}
            Err(error) => break format!("{error:#}"),
        }
        if told.elapsed() >= PERIOD {
            told = Instant::now();
            if let Err(error) = member.sender.send(&ToNode::Alive) {
                break format!("{error:#}");
            }
        }
    };
    let mut state = shared.state();
    // Who waits for its commands learns from the end of the channel.
    if let Some(member) = state.members.remove(&node) {
        member.sender.close();
        if !state.over {
            say(&format!("node {node}, {}, is gone: {why}", member.name));
        }
        state.lost.push(member.name);
    }
}

/// One `@remote`: from its question to the end of the command, or its own.
fn agent(shared: &Shared, stream: &UnixStream) {
    // Whatever goes wrong here, the agent sees the end of the stream.
    let _ = serve_agent(shared, stream);
}

fn serve_agent(shared: &Shared, mut stream: &UnixStream) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream.take(1 << 20)).read_line(&mut line)?;
    let asked: Asked = serde_json::from_str(&line)?;
    let id = shared.next.fetch_add(1, Ordering::Relaxed);
    let (answers, answer) = channel();
    send(shared, &asked.host, &ToNode::Run { id, command: asked.command }, Some((id, answers)))?;
    stream.set_read_timeout(Some(TICK))?;
    if let Some(code) = wait(stream, &answer)? {
        return Ok(writeln!(stream, "{}", code.clamp(0, 255))?);
    }
    send(shared, &asked.host, &ToNode::End { id }, None)
}

fn send(shared: &Shared, host: &str, message: &ToNode, waiting: Option<(u64, Answers<i32>)>) -> Result<()> {
    let mut state = shared.state();
    let member = state.members.values_mut().find(|member| member.name == host);
    ensure!(member.is_some(), "{host} is not here");
    let member = member.expect("just seen");
    member.waiting.extend(waiting);
    member.sender.send(message)
}

/// None: the agent has ended, and the command shall too.
fn wait(mut stream: &UnixStream, answer: &Receiver<i32>) -> Result<Option<i32>> {
    loop {
        match answer.try_recv() {
            Ok(code) => return Ok(Some(code)),
            Err(TryRecvError::Disconnected) => anyhow::bail!("the node is gone"),
            Err(TryRecvError::Empty) => {}
        }
        match stream.read(&mut [0; 16]) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {}
            Err(_) => return Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LONGEST, reachable, socket, socket_folder};
    use std::os::unix::net::UnixListener;

    #[test]
    fn agents_find_their_socket_whatever_the_folder_for_temporary_files() {
        let root = tempfile::tempdir().expect("a folder");
        let used = |name: &str| {
            let base = root.path().join(name);
            std::fs::create_dir_all(&base).expect("a folder");
            let folder = socket_folder(&base).expect("a folder");
            UnixListener::bind(socket(&folder)).expect("a socket");
            folder.path().starts_with(&base)
        };
        let longest = "x".repeat(LONGEST - root.path().as_os_str().len() - 1);
        assert_eq!([longest.clone(), longest + "x", "a blank".to_string()].map(|name| used(&name)), [true, false, false]);
    }

    #[test]
    fn a_name_for_the_loopback_is_listened_for_everywhere() {
        let listens = |address: &str, found: &str| {
            let candidates = found.split(' ').map(|address| address.parse().expect("an address")).collect();
            reachable(address, candidates).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        for found in ["127.0.1.1:29400", "127.0.1.1:29400 10.0.0.1:29400", "10.0.0.1:29400 127.0.1.1:29400"] {
            assert_eq!(listens("n1:29400", found), ["[::]:29400", "0.0.0.0:29400"], "{found}");
        }
        assert_eq!(listens("n1:29400", "10.0.0.1:29400 10.1.0.1:29400"), ["10.0.0.1:29400", "10.1.0.1:29400"]);
        assert_eq!(listens("localhost:29400", "127.0.0.1:29400"), ["127.0.0.1:29400"]);
        assert_eq!(listens("127.0.0.1:29400", "127.0.0.1:29400"), ["127.0.0.1:29400"]);
    }
}
