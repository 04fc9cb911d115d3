//! Looks at the ranks' logs in a thread of its own: where many ranks' are on a slow file system a look takes long, and no
//! signal may wait for that.
use crate::progress::{Event, Progress, Slow, idle_ranks};
use crate::work::report;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

/// The file system is one that many share: it is asked so often, of at most so many files a second.
const POLL: Duration = Duration::from_secs(1);
const FILES: u32 = 256;
/// How long a hung rank is looked at.
const STARE: Duration = Duration::from_secs(1);
/// So long the last look may take when the ranks have ended.
const LAST: Duration = Duration::from_secs(30);
const TICK: Duration = Duration::from_millis(100);

pub enum News {
    Event(Event),
    /// Why no hang can be seen.
    Blind(String),
    Slow(Slow),
    /// How long ranks worked, at the end.
    Work(String),
}

/// Told once.
pub struct Hung {
    pub words: String,
    pub last_rank: Option<usize>,
}

struct Look {
    step: Option<u64>,
    made_a_step: bool,
    news: Vec<News>,
    hung: Option<Hung>,
}

pub struct Lookout {
    looks: Receiver<Look>,
    /// The thread ends when this does.
    watching: Option<Sender<()>>,
    /// As of the last look.
    pub step: Option<u64>,
    pub made_a_step: bool,
    looked: Instant,
    told_late: bool,
}

impl Lookout {
    /// `guard`: the process below which the ranks of this host are. `ranks`: of the world.
    pub fn start(progress: Progress, guard: u32, ranks: usize) -> Self {
        let (looked, looks) = channel();
        let (watching, until) = channel();
        std::thread::spawn(move || look_out(progress, (guard, ranks), &until, &looked));
        Lookout { looks, watching: Some(watching), step: None, made_a_step: false, looked: Instant::now(), told_late: false }
    }

    /// Since the last call; does not wait.
    pub fn take(&mut self) -> (Vec<News>, Option<Hung>) {
        let looks: Vec<Look> = self.looks.try_iter().collect();
        let (mut news, mut hung) = (Vec::new(), None);
        for look in looks {
            news.extend(self.keep(look, &mut hung));
        }
        (news, hung)
    }

    /// That no look has ended for longer than `limit`: the ranks, too, may stand still for that. Once.
    pub fn late(&mut self, limit: Duration) -> Option<String> {
        let quiet = self.looked.elapsed();
        (quiet > limit && !std::mem::replace(&mut self.told_late, true))
            .then(|| format!("a look at the ranks' logs takes {:.0} s and has not ended: their file system does not answer, and no hang is seen", quiet.as_secs_f64()))
    }

    /// A last look at the logs of ranks that have ended, unless it takes too long or `stop` says so meanwhile.
    pub fn end(&mut self, mut stop: impl FnMut() -> bool) -> Vec<News> {
        self.watching = None;
        let (start, mut news) = (Instant::now(), Vec::new());
        while start.elapsed() < LAST && !stop() {
            match self.looks.recv_timeout(TICK) {
                Ok(look) => news.extend(self.keep(look, &mut None)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        news
    }

    fn keep(&mut self, look: Look, hung: &mut Option<Hung>) -> Vec<News> {
        (self.step, self.made_a_step) = (look.step, look.made_a_step);
        (self.looked, self.told_late) = (Instant::now(), false);
        *hung = look.hung.or(hung.take());
        look.news
    }
}

fn look_out(mut progress: Progress, (guard, ranks): (u32, usize), until: &Receiver<()>, looked: &Sender<Look>) {
    let mut told_hung = false;
    let pause = POLL * (ranks as u32).div_ceil(FILES).max(1);
    loop {
        let last = until.recv_timeout(pause) != Err(RecvTimeoutError::Timeout);
        let now = Instant::now();
        progress.poll(now);
        let mut news: Vec<News> = progress.take_events().into_iter().map(News::Event).collect();
        news.extend(progress.blind().map(News::Blind));
        let quiet = progress.hung(now).filter(|_| !last && !told_hung);
        if last {
            news.extend(report(&progress.worked()).map(News::Work));
        } else {
            news.extend(progress.slow().map(News::Slow));
        }
        told_hung |= quiet.is_some();
        let hung = quiet.map(|quiet| hung(&progress, quiet, guard, ranks));
        let look = Look { step: progress.step(), made_a_step: progress.made_a_step(), news, hung };
        if looked.send(look).is_err() || last {
            return;
        }
    }
}

fn hung(progress: &Progress, quiet: Duration, guard: u32, ranks: usize) -> Hung {
    let idle = idle_ranks(guard, STARE).map(|idle| format!("; {idle}")).unwrap_or_default();
    let waits = progress.waits(ranks).map(|waits| format!("; {waits}")).unwrap_or_default();
    let words = format!("hung: no step for {:.0} s; {}{idle}{waits}", quiet.as_secs_f64(), progress.behind());
    Hung { words, last_rank: progress.last_rank() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_does_not_end_is_said_once() {
        let (looked, looks) = channel();
        let mut lookout = Lookout { looks, watching: None, step: None, made_a_step: false, looked: Instant::now(), told_late: false };
        assert_eq!(lookout.late(Duration::from_secs(3600)), None);
        let words = lookout.late(Duration::ZERO).expect("words");
        assert!(words.contains("their file system does not answer"), "{words}");
        assert_eq!(lookout.late(Duration::ZERO), None);
        looked.send(Look { step: Some(4), made_a_step: true, news: Vec::new(), hung: None }).expect("sent");
        lookout.take();
        assert!(lookout.step == Some(4) && lookout.late(Duration::ZERO).is_some(), "another one");
    }
}
