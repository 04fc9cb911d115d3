//! A listening port behind which only those who know the secret are let in. Everybody else costs a thread for five seconds at
//! most, and of those there are few at a time.
use crate::incidents::say;
use crate::wire::{self, Receiver, Secret, Sender};
use anyhow::{Context, Result};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// Handshakes at a time; beyond them a caller is turned away at once, and one that belongs here tries again.
const PENDING: usize = 128;
const STACK: usize = 128 << 10;

pub type Connection = (SocketAddr, Sender, Receiver);

/// Listens as long as this process lives. `admitted` runs in a thread of its own for each connection.
pub fn open(listener: TcpListener, secret: Secret, admitted: impl Fn(Connection) + Send + Sync + 'static) -> Result<SocketAddr> {
    let address = listener.local_addr()?;
    let shared = Arc::new((secret, admitted, AtomicUsize::new(0), AtomicUsize::new(0)));
    let accept = move || {
        for stream in listener.incoming() {
            // Out of file descriptors, for example: others may be given back.
            let Ok(stream) = stream else {
                thread::sleep(Duration::from_millis(50));
                continue;
            };
            if shared.2.fetch_add(1, Ordering::Relaxed) >= PENDING {
                shared.2.fetch_sub(1, Ordering::Relaxed);
                continue;
            }
            let caller = shared.clone();
            let started = thread::Builder::new().stack_size(STACK).spawn(move || {
                let (secret, admitted, pending, refused) = &*caller;
                let outcome = handshake(stream, secret);
                pending.fetch_sub(1, Ordering::Relaxed);
                match outcome {
                    Ok(connection) => admitted(connection),
                    Err(error) => report(refused.fetch_add(1, Ordering::Relaxed) + 1, &error),
                }
            });
            if started.is_err() {
                shared.2.fetch_sub(1, Ordering::Relaxed);
            }
        }
    };
    thread::Builder::new().spawn(accept).context("cannot start the thread that listens")?;
    Ok(address)
}

fn handshake(stream: TcpStream, secret: &Secret) -> Result<Connection> {
    let from = stream.peer_addr()?;
    let (sender, receiver) = wire::accept(stream, secret).with_context(|| format!("refused {from}"))?;
    Ok((from, sender, receiver))
}

/// The first few, then every tenth power: whoever hammers at the port does not fill our log.
fn report(number: usize, error: &anyhow::Error) {
    if number <= 5 {
        say(&format!("{error:#}"));
    } else if 10_usize.pow(number.ilog10()) == number {
        say(&format!("{error:#}; refused {number} connections so far"));
    }
}
