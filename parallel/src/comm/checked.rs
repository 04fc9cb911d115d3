//! A debug wrapper around any communicator: before each collective the ranks compare what they are about to do,
//! so a rank that takes another branch shows as an error with both call sites instead of a hang or a wrong sum.
//! Costs one small all_gather a call. Sends and receives of `exchange` concern two ranks only: they are logged,
//! and compared pair by pair at the next collective of the same group.
//!
//! Invariant: the comparison itself is the same call on every rank, whatever each is about to do; so it cannot
//! disagree. Call sites are named but not compared: root and others may well stand on different lines.

use super::call::{self, Call};
use super::{Comm, CommError, Communicator, Pending, Reduce, TensorSpec, Work, gather_bytes, specs};
use std::cell::{Cell, RefCell};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::Location;
use std::rc::Rc;
use tch::{Device, Kind, Tensor};

/// `comm` with its calls compared across ranks; errors name `axis` (as in "data", "pipe").
pub fn checked(comm: Comm, axis: &str) -> Comm {
    let size = comm.size();
    let log = || RefCell::new(vec![Vec::new(); size]);
    Rc::new(Checked { comm, axis: axis.to_string(), num_calls: Cell::new(0), sent: log(), expected: log() })
}

struct Checked {
    comm: Comm,
    axis: String,
    num_calls: Cell<u64>,
    /// Since the last comparison, per peer: what was sent to it and what it was expected to send.
    sent: RefCell<Vec<Vec<Entry>>>,
    expected: RefCell<Vec<Vec<Entry>>>,
}

/// One message and where it was asked for.
#[derive(Clone)]
struct Entry {
    message: String,
    site: &'static Location<'static>,
}

fn fingerprint(text: &impl Hash) -> i64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish() as i64
}

impl Checked {
    /// Compares a collective that this rank is about to enter.
    /// Notes what is to meet what.
    fn expect(&self, sends: &[(usize, Tensor)], recvs: &[(usize, TensorSpec)], site: &'static Location<'static>) -> Result<(), CommError> {
        for peer in sends.iter().map(|s| s.0).chain(recvs.iter().map(|r| r.0)) {
            call::check_peer("exchange", peer, self.size())?;
        }
        for (to, tensor) in sends {
            let message = format!("{:?}{:?}", tensor.kind(), tensor.size());
            self.sent.borrow_mut()[*to].push(Entry { message, site });
        }
        for (from, spec) in recvs {
            let message = format!("{:?}{:?}", spec.kind, spec.shape);
            self.expected.borrow_mut()[*from].push(Entry { message, site });
        }
        Ok(())
    }

    fn compare(&self, call: &Call, site: &'static Location<'static>) -> Result<(), CommError> {
        let number = self.num_calls.replace(self.num_calls.get() + 1);
        let exchanged = self.sent.borrow().iter().chain(self.expected.borrow().iter()).any(|log| !log.is_empty());
        // Shapes and kinds, the axis and how many calls came before: a rank that skipped one differs here.
        let mine = fingerprint(&(call.to_string(), &self.axis, number));
        let record = Tensor::from_slice(&[mine, exchanged as i64]).view([1, 2]);
        let all = self.comm.all_gather(vec![record])?.wait()?;
        let all = Vec::<i64>::try_from(all[0].view([-1])).expect("i64 records");
        let records: Vec<&[i64]> = all.chunks(2).collect();
        if records.iter().any(|r| r[0] != records[0][0]) {
            return self.report(&format!("{call} on axis {}, call {number}, at {site}", self.axis), &records);
        }
        if records.iter().any(|r| r[1] != 0) { self.compare_exchanges() } else { Ok(()) }
    }

    /// Everyone tells its call; the error names the first rank that differs from this one.
    fn report(&self, mine: &str, records: &[&[i64]]) -> Result<(), CommError> {
        let all = gather_bytes(&*self.comm, mine.as_bytes())?;
        let rank = self.rank();
        let peer = records.iter().position(|r| r[0] != records[rank][0]).expect("records differ");
        let theirs = String::from_utf8_lossy(&all[peer]).into_owned();
        Err(CommError::Disagree { rank, peer, mine: mine.to_string(), theirs })
    }

    /// What each rank sent to this one must be what this one expected, message by message.
    fn compare_exchanges(&self) -> Result<(), CommError> {
        let (sent, expected) = (self.sent.take(), self.expected.take());
        let empty = vec![Vec::new(); self.size()];
        (*self.sent.borrow_mut(), *self.expected.borrow_mut()) = (empty.clone(), empty);
        let digest = |log: &Vec<Entry>| fingerprint(&log.iter().map(|e| &e.message).collect::<Vec<_>>());
        let theirs = self.comm.exchange_counts(&sent.iter().map(|log| vec![digest(log)]).collect::<Vec<_>>())?;
        let wrong = theirs.iter().zip(&expected).position(|(theirs, log)| theirs[0] != digest(log));
        // All enter the second round if one must: it is a collective, too.
        let anyone = self.comm.all_reduce(vec![Tensor::from_slice(&[wrong.is_some() as i64])], Reduce::Max)?.wait()?;
        if anyone[0].int64_value(&[0]) == 0 {
            return Ok(());
        }
        let told = |log: &[Entry], verb: &str| -> Vec<String> { log.iter().map(|e| format!("exchange {verb} {} on axis {} at {}", e.message, self.axis, e.site)).collect() };
        let mine: Vec<Vec<String>> = sent.iter().map(|log| told(log, "sending")).collect();
        let all = gather_bytes(&*self.comm, join(&mine).as_bytes())?;
        let rank = self.rank();
        let Some(peer) = wrong else {
            let reason = "other ranks disagree about an exchange, see theirs".to_string();
            return Err(CommError::Lost { rank, size: self.size(), op: "exchange", reason });
        };
        let theirs = cut(&String::from_utf8_lossy(&all[peer]), rank);
        let messages = |entries: &[Entry]| entries.iter().map(|e| e.message.clone()).collect::<Vec<_>>();
        let wanted = messages(&expected[peer]);
        let differs = |i: usize| wanted.get(i).is_none_or(|w| theirs.get(i).is_none_or(|t| !t.contains(w.as_str())));
        let at = (0..wanted.len().max(theirs.len())).find(|&i| differs(i)).unwrap_or(0);
        let nothing = || format!("nothing more ({at} messages matched)");
        let mine = told(&expected[peer], "expecting").get(at).cloned().unwrap_or_else(nothing);
        Err(CommError::Disagree { rank, peer, mine, theirs: theirs.get(at).cloned().unwrap_or_else(nothing) })
    }
}

/// Logs as text: a line a peer, messages separated by tabs.
fn join(logs: &[Vec<String>]) -> String {
    logs.iter().map(|log| log.join("\t")).collect::<Vec<_>>().join("\n")
}

fn cut(text: &str, peer: usize) -> Vec<String> {
    text.split('\n').nth(peer).unwrap_or("").split('\t').filter(|m| !m.is_empty()).map(str::to_string).collect()
}

impl Communicator for Checked {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn size(&self) -> usize {
        self.comm.size()
    }

    fn all_reduce(&self, tensors: Vec<Tensor>, op: Reduce) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.compare(&Call::new("all_reduce", &tensors).reducing(op), Location::caller())?;
        self.comm.all_reduce(tensors, op)
    }

    fn reduce_scatter(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.compare(&Call::new("reduce_scatter", &tensors), Location::caller())?;
        self.comm.reduce_scatter(tensors)
    }

    fn all_gather(&self, tensors: Vec<Tensor>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.compare(&Call::new("all_gather", &tensors), Location::caller())?;
        self.comm.all_gather(tensors)
    }

    fn broadcast(&self, tensors: Vec<Tensor>, root: usize) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.compare(&Call::new("broadcast", &tensors).rooted(root), Location::caller())?;
        self.comm.broadcast(tensors, root)
    }

    fn exchange_counts(&self, counts: &[Vec<i64>]) -> Result<Vec<Vec<i64>>, CommError> {
        let lengths: Vec<Tensor> = counts.iter().map(|c| Tensor::from_slice(c)).collect();
        self.compare(&Call::new("exchange_counts", &lengths), Location::caller())?;
        self.comm.exchange_counts(counts)
    }

    fn all_to_all_under(&self, tensors: Vec<Tensor>, send: &[i64], recv: &[i64], work: Work) -> Result<Pending<Vec<Tensor>>, CommError> {
        let site = Location::caller();
        call::check_all_to_all(&tensors, send, recv, self.size())?;
        self.compare(&Call::new("all_to_all", &tensors).rows_free(), site)?;
        let theirs = self.comm.exchange_counts(&send.iter().map(|&rows| vec![rows]).collect::<Vec<_>>())?;
        if let Some(peer) = theirs.iter().zip(recv).position(|(theirs, &mine)| theirs[0] != mine) {
            let mine = format!("all_to_all receiving {} rows on axis {} at {site}", recv[peer], self.axis);
            return Err(CommError::Disagree { rank: self.rank(), peer, mine, theirs: format!("all_to_all sending {} rows", theirs[peer][0]) });
        }
        self.comm.all_to_all_under(tensors, send, recv, work)
    }

    fn exchange(&self, sends: Vec<(usize, Tensor)>, recvs: Vec<(usize, TensorSpec)>) -> Result<Pending<Vec<Tensor>>, CommError> {
        self.expect(&sends, &recvs, Location::caller())?;
        self.comm.exchange(sends, recvs)
    }

    fn exchange_into(&self, sends: Vec<(usize, Tensor)>, places: Vec<(usize, Tensor)>) -> Result<Pending<()>, CommError> {
        self.expect(&sends, &specs(&places), Location::caller())?;
        self.comm.exchange_into(sends, places)
    }

    fn room(&self, shape: &[i64], kind: Kind, device: Device) -> Result<Tensor, CommError> {
        self.comm.room(shape, kind, device)
    }

    fn lands_in_place(&self) -> bool {
        self.comm.lands_in_place()
    }

    fn buffer_bytes(&self) -> usize {
        self.comm.buffer_bytes()
    }

    fn split(&self, colour: usize, key: usize) -> Result<Comm, CommError> {
        self.compare(&Call::new("split", &[]), Location::caller())?;
        let axis = format!("{}/{colour}", self.axis);
        Ok(checked(self.comm.split(colour, key)?, &axis))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::barrier;
    use crate::comm::local::run_local;
    use tch::{Device, Kind};

    fn zeros(n: i64) -> Vec<Tensor> {
        vec![Tensor::zeros([n], (Kind::Float, Device::Cpu))]
    }

    /// Each rank's error of a program in which they disagree.
    fn errors(size: usize, program: impl Fn(&dyn Communicator) -> Result<(), CommError> + Sync) -> Vec<String> {
        run_local(size, |comm| program(&*checked(comm, "data")).expect_err("ranks disagree").to_string())
    }

    #[test]
    fn the_call_sites_of_both_are_named() {
        let line = line!();
        let found = errors(3, |comm| match comm.rank() {
            2 => comm.all_gather(zeros(4))?.wait().map(|_| ()),
            _ => comm.all_reduce(zeros(4), Reduce::Sum)?.wait().map(|_| ()),
        });
        for (rank, text) in found.iter().enumerate() {
            let sites = [format!("checked.rs:{}:", line + 2), format!("checked.rs:{}:", line + 3)];
            assert!(sites.iter().all(|site| text.contains(site)), "rank {rank}: {text}");
            assert!(text.contains("all_gather (Float[4]) on axis data, call 0"), "{text}");
        }
    }

    #[test]
    fn shape_kind_root_rows_and_a_skipped_call_are_caught() {
        let of = |rank: usize, a: i64, b: i64| zeros(if rank == 0 { a } else { b });
        assert!(errors(2, |c| c.all_reduce(of(c.rank(), 3, 4), Reduce::Sum).map(drop))[1].contains("Float[3]"));
        assert!(errors(2, |c| c.broadcast(zeros(3), c.rank()).map(drop))[0].contains("from rank 1"));
        let kinds = errors(2, |c| {
            let kind = if c.rank() == 0 { Kind::Float } else { Kind::BFloat16 };
            c.reduce_scatter(vec![Tensor::zeros([2], (kind, Device::Cpu))]).map(drop)
        });
        assert!(kinds[0].contains("BFloat16[2]") && kinds[0].contains("Float[2]"), "{kinds:?}");
        let rows = errors(2, |c| c.all_to_all(zeros(2), &[1, 1], if c.rank() == 0 { &[1, 1] } else { &[2, 1] }).map(drop).and_then(|()| barrier(c)));
        assert!(rows[1].contains("receiving 2 rows") && rows[1].contains("sending 1"), "{rows:?}");
        // Same shapes, but rank 1 has left one out: the numbers of the calls differ only at the end.
        let skipped = errors(2, |c| {
            for _ in 0..2 + c.rank() {
                let _ = c.all_reduce(zeros(3), Reduce::Sum)?.wait()?;
            }
            c.all_gather(zeros(3)).map(drop)
        });
        assert!(skipped[0].contains("all_gather") && skipped[0].contains("all_reduce Sum") && skipped[0].contains("call 2"), "{skipped:?}");
    }

    #[test]
    fn a_wrong_message_shows_at_the_next_collective() {
        let found = errors(3, |comm| {
            let spec = |n| TensorSpec { shape: vec![n], kind: Kind::Float, device: Device::Cpu };
            match comm.rank() {
                0 => drop(comm.exchange(vec![(1, zeros(2).remove(0)), (1, zeros(5).remove(0))], vec![])?),
                1 => drop(comm.exchange(vec![], vec![(0, spec(2)), (0, spec(4))])?),
                _ => {}
            }
            barrier(comm)
        });
        assert!(found[1].contains("expecting Float[4]") && found[1].contains("sending Float[5]"), "{}", found[1]);
        assert!(found[1].matches("checked.rs:").count() == 2, "{}", found[1]);
    }

    #[test]
    fn ranks_that_agree_notice_nothing() {
        run_local(4, |comm| {
            let comm = checked(comm, "world");
            let group = comm.split(comm.rank() / 2, 0).unwrap();
            let peer = 1 - group.rank();
            let spec = TensorSpec { shape: vec![3], kind: Kind::Float, device: Device::Cpu };
            let got = group.exchange(vec![(peer, zeros(3).remove(0) + comm.rank() as f64)], vec![(peer, spec)]).unwrap().wait().unwrap();
            let sum = group.all_reduce(got, Reduce::Sum).unwrap().wait().unwrap();
            assert_eq!(sum[0].double_value(&[0]), if comm.rank() < 2 { 1.0 } else { 5.0 });
            assert_eq!(group.exchange_counts(&[vec![1], vec![2]]).unwrap(), vec![vec![1 + group.rank() as i64]; 2]);
            barrier(&*comm).unwrap();
        });
    }
}
