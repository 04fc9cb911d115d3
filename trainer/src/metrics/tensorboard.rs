//! TensorBoard's event file. The crate's own writer takes a full disk for a bug, on a thread of its own: from it are the
//! records, the file is ours.
use super::log::Log;
use anyhow::Context;
use protobuf::Message;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use tensorboard_proto::event::{Event, SessionLog_SessionStatus};
use tensorboard_rs::record_writer::RecordWriter;
use tensorboard_rs::summary::scalar;

/// None: its file could not be made. A run goes on without: a full file system's next free file may be a checkpoint's.
pub struct Events(Option<Log>);

impl Events {
    /// `done_steps`: what earlier files say of later steps was of an attempt that did not last, and is not shown.
    pub fn create(folder: &Path, host: &str, done_steps: u64) -> Events {
        let name = format!("events.out.tfevents.{:010}.{host}.{}.0", now() as u64, std::process::id());
        let made = std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()));
        let log = made.and_then(|()| Log::open(&folder.join(name)));
        let mut events = Events(log.inspect_err(|error| tracing::warn!("no TensorBoard of this start: {error:#}")).ok());
        let mut version = Event::new();
        version.set_file_version("brain.Event:2".to_string());
        events.add(version);
        let mut start = Event::new();
        start.set_step(done_steps as i64 + 1);
        start.mut_session_log().set_status(SessionLog_SessionStatus::START);
        events.add(start);
        events
    }

    pub fn scalar(&mut self, tag: &str, value: f64, step: u64) {
        let mut event = Event::new();
        event.set_step(step as i64);
        event.set_summary(scalar(tag, value as f32));
        self.add(event);
    }

    fn add(&mut self, mut event: Event) {
        let Some(log) = &mut self.0 else { return };
        event.set_wall_time(now());
        let mut record = Vec::new();
        let bytes = event.write_to_bytes().expect("into memory");
        RecordWriter::new(&mut record).write(&bytes).expect("into memory");
        log.append(&record);
    }
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}
