//! A connection between two launchers that both know a secret: challenge and response, then frames with a code each.
//!
//! ```text
//! server → client   magic, server's nonce
//! client → server   client's nonce, keyed hash of ("client", both nonces)
//! server → client   keyed hash of ("server", both nonces)
//! either            length, keyed hash of (count, payload) under the key of this connection and direction, payload
//! ```
//!
//! The hash is BLAKE3 keyed with the secret. Nonces are fresh on both sides, so a recorded exchange proves nothing again;
//! frames carry their number, so none can be repeated, left out or put in by others. Nothing is encrypted.
use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

const MAGIC: &[u8; 8] = b"tiefsee1";
/// Of a secret's text: a short one could be guessed from one recorded exchange.
const LEAST_SECRET: usize = 16;
/// Of a whole handshake.
const PATIENCE: Duration = Duration::from_secs(5);
/// mpirun's command for a daemon is some 2 KB.
const LARGEST_FRAME: usize = 64 << 10;
/// A peer that does not take what is sent for so long is gone.
const STUCK: Duration = Duration::from_secs(5);

type Nonce = [u8; 32];

#[derive(Clone)]
pub struct Secret([u8; 32]);

impl Secret {
    pub fn new(text: &[u8]) -> Result<Self> {
        let text = text.trim_ascii();
        ensure!(text.len() >= LEAST_SECRET, "a secret of {} bytes is too short: at least {LEAST_SECRET}, for example of `openssl rand -hex 32`", text.len());
        Ok(Secret(blake3::derive_key("tiefsee-launch 2026-11 secret of a rendezvous", text)))
    }

    /// Others must not be able to read the file.
    pub fn read(path: &Path) -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let shown = path.display();
        let mode = std::fs::metadata(path).with_context(|| format!("cannot read the secret {shown}"))?.permissions().mode();
        ensure!(mode & 0o077 == 0, "others may read the secret {shown} (mode {:o}): chmod 600 {shown}", mode & 0o777);
        Secret::new(&std::fs::read(path).with_context(|| format!("cannot read the secret {shown}"))?).with_context(|| shown.to_string())
    }

    pub fn random() -> Self {
        Secret(nonce())
    }

    pub fn to_hex(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    pub fn from_hex(text: &str) -> Result<Self> {
        Ok(Secret(*blake3::Hash::from_hex(text)?.as_bytes()))
    }

    fn proof(&self, word: &str, server: &Nonce, client: &Nonce) -> blake3::Hash {
        blake3::Hasher::new_keyed(&self.0).update(word.as_bytes()).update(server).update(client).finalize()
    }
}

fn nonce() -> Nonce {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}

/// One direction each; both halves know only their own key and count.
pub struct Sender {
    stream: TcpStream,
    key: [u8; 32],
    count: u64,
}

pub struct Receiver {
    stream: TcpStream,
    key: [u8; 32],
    count: u64,
    /// Of a frame that has not arrived whole.
    buffer: Vec<u8>,
}

/// The server's side of a handshake. Nobody else's word is believed, or kept, before it is over.
pub fn accept(stream: TcpStream, secret: &Secret) -> Result<(Sender, Receiver)> {
    let deadline = Instant::now() + PATIENCE;
    let server = nonce();
    send(&stream, &[MAGIC.as_slice(), &server].concat())?;
    let mut answer = [0; 64];
    receive(&stream, &mut answer, deadline)?;
    let client: Nonce = answer[..32].try_into().expect("32 of 64");
    let shown = blake3::Hash::from_bytes(answer[32..].try_into().expect("32 of 64"));
    // Compared in constant time.
    ensure!(secret.proof("client", &server, &client) == shown, "a wrong secret");
    send(&stream, secret.proof("server", &server, &client).as_bytes())?;
    halves(stream, secret, [&server, &client], ["to client", "to server"])
}

/// To the first of a peer's addresses at which it answers and knows the secret.
pub fn connect(addresses: &[SocketAddr], secret: &Secret) -> Result<(Sender, Receiver)> {
    let mut errors = Vec::new();
    for address in addresses {
        match connect_to(address, secret) {
            Ok(connection) => return Ok(connection),
            Err(error) => errors.push(format!("{error:#}")),
        }
    }
    ensure!(!errors.is_empty(), "no address");
    bail!(errors.join("; "))
}

fn connect_to(address: &SocketAddr, secret: &Secret) -> Result<(Sender, Receiver)> {
    let stream = TcpStream::connect_timeout(address, PATIENCE).with_context(|| format!("cannot connect to {address}"))?;
    let deadline = Instant::now() + PATIENCE;
    let mut greeting = [0; 40];
    receive(&stream, &mut greeting, deadline).with_context(|| format!("{address} does not answer"))?;
    ensure!(&greeting[..8] == MAGIC, "{address} is not a tiefsee-launch of this version");
    let (server, client): (Nonce, Nonce) = (greeting[8..].try_into().expect("32 of 40"), nonce());
    send(&stream, &[client.as_slice(), secret.proof("client", &server, &client).as_bytes()].concat())?;
    let mut proof = [0; 32];
    receive(&stream, &mut proof, deadline).with_context(|| format!("{address} refused us: is its secret the same?"))?;
    ensure!(secret.proof("server", &server, &client) == blake3::Hash::from_bytes(proof), "{address} does not know the secret");
    halves(stream, secret, [&server, &client], ["to server", "to client"])
}

fn halves(stream: TcpStream, secret: &Secret, [server, client]: [&Nonce; 2], [sending, receiving]: [&str; 2]) -> Result<(Sender, Receiver)> {
    stream.set_write_timeout(Some(STUCK))?;
    stream.set_nodelay(true)?;
    let key = |word: &str| *secret.proof(word, server, client).as_bytes();
    let receiver = Receiver { stream: stream.try_clone()?, key: key(receiving), count: 0, buffer: Vec::new() };
    Ok((Sender { stream, key: key(sending), count: 0 }, receiver))
}

fn send(mut stream: &TcpStream, bytes: &[u8]) -> Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream.write_all(bytes)?)
}

/// Exactly `bytes`, before the deadline, however slowly they drip.
fn receive(mut stream: &TcpStream, bytes: &mut [u8], deadline: Instant) -> Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let left = deadline.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "no answer within {} s", PATIENCE.as_secs());
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut bytes[done..]) {
            Ok(0) => bail!("the connection was closed"),
            Ok(read) => done += read,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn code(key: &[u8; 32], count: u64, payload: &[u8]) -> blake3::Hash {
    blake3::Hasher::new_keyed(key).update(&count.to_le_bytes()).update(payload).finalize()
}

impl Sender {
    pub fn send(&mut self, message: &impl Serialize) -> Result<()> {
        let payload = serde_json::to_vec(message)?;
        ensure!(payload.len() <= LARGEST_FRAME, "a message of {} bytes; at most {LARGEST_FRAME}", payload.len());
        let frame = [&(payload.len() as u32).to_le_bytes(), code(&self.key, self.count, &payload).as_bytes().as_slice(), &payload].concat();
        self.count += 1;
        Ok(self.stream.write_all(&frame)?)
    }

    /// Both directions, for this half and its receiver.
    pub fn close(&self) {
        // One that is closed is what we want.
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Receiver {
    /// The next message; None: nothing whole has come within `wait`.
    pub fn receive<T: DeserializeOwned>(&mut self, wait: Duration) -> Result<Option<T>> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(payload) = self.frame()? {
                return Ok(Some(serde_json::from_slice(&payload)?));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut bytes = [0; 4096];
            match self.stream.read(&mut bytes) {
                Ok(0) => bail!("the connection was closed"),
                Ok(read) => self.buffer.extend_from_slice(&bytes[..read]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn frame(&mut self) -> Result<Option<Vec<u8>>> {
        let Some(length) = self.buffer.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*length) as usize;
        ensure!(length <= LARGEST_FRAME, "a message of {length} bytes; at most {LARGEST_FRAME}");
        if self.buffer.len() < 36 + length {
            return Ok(None);
        }
        let rest = self.buffer.split_off(36 + length);
        let frame = std::mem::replace(&mut self.buffer, rest);
        let shown = blake3::Hash::from_bytes(frame[4..36].try_into().expect("32 bytes"));
        ensure!(code(&self.key, self.count, &frame[36..]) == shown, "a message that was changed or repeated on its way");
        self.count += 1;
        Ok(Some(frame[36..].to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;
    use std::thread;

    fn secret(text: &str) -> Secret {
        Secret::new(text.as_bytes()).expect("long enough")
    }

    /// A server that accepts one connection, and where it listens.
    fn server(own: Secret) -> (SocketAddr, thread::JoinHandle<Result<(Sender, Receiver)>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        (address, thread::spawn(move || accept(listener.accept().expect("a connection").0, &own)))
    }

    /// Where nobody listens.
    fn nobody() -> SocketAddr {
        "127.0.0.1:1".parse().expect("an address")
    }

    #[test]
    fn both_sides_prove_themselves_and_frames_arrive_in_order() {
        let (address, server) = server(secret("a secret of the test"));
        let (mut to_server, mut from_server) = connect(&[nobody(), address], &secret(" a secret of the test\n")).expect("accepted");
        let (mut to_client, mut from_client) = server.join().expect("ends").expect("accepted");
        for number in 0..3 {
            to_server.send(&number).expect("sent");
            to_client.send(&(10 * number)).expect("sent");
        }
        let wait = Duration::from_secs(5);
        let numbers: Vec<i32> = (0..3).map(|_| from_client.receive(wait).expect("whole").expect("there")).collect();
        assert_eq!(numbers, [0, 1, 2]);
        assert_eq!(from_server.receive::<i32>(wait).expect("whole"), Some(0));
        assert_eq!(from_client.receive::<i32>(Duration::ZERO).expect("open"), None);
        to_server.close();
        assert!(from_client.receive::<i32>(wait).is_err());
    }

    #[test]
    fn a_wrong_secret_is_refused_by_either_side() {
        let (address, server) = server(secret("a secret of the test"));
        let nobody = nobody();
        let error = connect(&[address, nobody], &secret("another secret of ours")).err().expect("refused").to_string();
        assert!(error.contains("is its secret the same?") && error.contains(&format!("; cannot connect to {nobody}: ")), "{error}");
        assert_eq!(server.join().expect("ends").err().expect("refused").to_string(), "a wrong secret");
        // A server that answers anything, to learn what the client would do.
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let impostor = thread::spawn(move || {
            let mut stream = listener.accept().expect("a connection").0;
            stream.write_all(&[MAGIC.as_slice(), &[7; 32]].concat()).expect("sent");
            stream.read_exact(&mut [0; 64]).expect("an answer");
            stream.write_all(&[7; 32]).expect("sent");
        });
        let error = connect(&[address], &secret("a secret of the test")).err().expect("refused");
        assert!(error.to_string().ends_with("does not know the secret"), "{error}");
        impostor.join().expect("ends");
    }

    #[test]
    fn a_recorded_handshake_and_a_changed_frame_prove_nothing() {
        let own = secret("a secret of the test");
        // What a client that knows the secret would say to one nonce, said to another.
        let (address, server) = server(own.clone());
        let mut replay = TcpStream::connect(address).expect("connected");
        replay.read_exact(&mut [0; 40]).expect("a greeting");
        let recorded = [[1; 32].as_slice(), own.proof("client", &[2; 32], &[1; 32]).as_bytes()].concat();
        replay.write_all(&recorded).expect("sent");
        assert_eq!(server.join().expect("ends").err().expect("refused").to_string(), "a wrong secret");

        let (address, server) = self::server(own.clone());
        let (mut to_server, _from_server) = connect(&[address], &own).expect("accepted");
        let (_to_client, mut from_client) = server.join().expect("ends").expect("accepted");
        to_server.send(&1).expect("sent");
        to_server.count = 0;
        to_server.send(&1).expect("sent");
        assert_eq!(from_client.receive::<i32>(Duration::from_secs(5)).expect("the first is right"), Some(1));
        let error = from_client.receive::<i32>(Duration::from_secs(5)).expect_err("the second has its number");
        assert!(error.to_string().contains("changed or repeated"), "{error}");
    }

    #[test]
    fn secrets_are_long_and_private() {
        use std::os::unix::fs::PermissionsExt;
        assert!(Secret::new(b"too short").is_err());
        let file = tempfile::NamedTempFile::new().expect("a file");
        std::fs::write(file.path(), "0123456789abcdef\n").expect("written");
        assert!(Secret::read(file.path()).is_ok());
        std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(0o644)).expect("set");
        assert!(Secret::read(file.path()).err().expect("refused").to_string().contains("chmod 600"));
    }
}
