//! What mpirun starts in place of ssh, with a host and the command of its daemon behind it.
use crate::guard::CANNOT_START;
use crate::incidents::say;
use serde::{Deserialize, Serialize};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::Command;

/// First arguments that make this executable an agent: over another agent, or over a rendezvous.
pub const REACH: &str = "@reach";
pub const REMOTE: &str = "@remote";
/// As ssh has it.
pub const NO_WAY: u8 = 255;

/// What an agent asks of the launcher that it belongs to.
#[derive(Serialize, Deserialize)]
pub struct Asked {
    pub host: String,
    pub command: String,
}

/// `NUMBER AGENT… HOST COMMAND…`, the agent being so many words: runs it, and names the host if that fails. mpirun itself
/// does not.
pub fn reach(number: &str, args: &[String]) -> u8 {
    let Some(host) = number.parse().ok().and_then(|number: usize| args.get(number)) else { return CANNOT_START };
    let code = match Command::new(&args[0]).args(&args[1..]).status() {
        Ok(status) => status.code().unwrap_or(i32::from(NO_WAY)),
        Err(error) => {
            say(&format!("cannot start {}: {error}", args[0]));
            return CANNOT_START;
        }
    };
    if code != 0 {
        say(&format!("cannot reach host {host}: {} ended with code {code}", args[0]));
    }
    code.clamp(0, 255) as u8
}

/// Asks the launcher behind `socket` to have the command run on the host that its first word names, and waits for its end.
pub fn remote(socket: &str, args: &[String]) -> u8 {
    let asked = Asked { host: args[0].clone(), command: args[1..].join(" ") };
    let answer = || -> std::io::Result<String> {
        let mut stream = UnixStream::connect(socket)?;
        stream.write_all(&serde_json::to_vec(&asked)?)?;
        stream.write_all(b"\n")?;
        // Our end, however it comes, ends the command: that closes the other direction.
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let _ = stream.shutdown(Shutdown::Both);
        Ok(answer)
    };
    match answer().map(|text| text.trim().parse::<u8>()) {
        Ok(Ok(0)) => 0,
        Ok(Ok(code)) => {
            say(&format!("cannot reach host {}: its daemon ended with code {code}", asked.host));
            code
        }
        _ => {
            say(&format!("cannot reach host {}: it is not, or no longer, at the rendezvous", asked.host));
            NO_WAY
        }
    }
}
