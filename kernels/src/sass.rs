//! What the assembler leaves undone in Hopper's machine code: how long a multiply-add keeps an operand.
//!
//! The FP8 GEMM adds up accumulators with long runs of FFMA that share a factor. Three registers from two banks are one
//! too many: kept from one FFMA to the next, the factor needs no read, and the banks are free for the matrix unit, which
//! reads and writes accumulators there at the same time. The assembler gives other warps a turn after every second FFMA, and
//! a turn loses what was kept. Here a run keeps its factor, with a turn every so often. The sums are the same bits.

/// The definition by which a source asks for it; its value is the number of FFMAs from one turn to the next.
pub(crate) const KEEP_FACTORS: &str = "KEEP_FACTORS";

/// An instruction has 16 bytes, its second word the bits of when it issues.
const FFMA: u64 = 0x223;
const NO_TURN: u64 = 1 << 45;
const KEEP_FACTOR: u64 = 1 << 59;

/// Changes the code of a cubin; how many FFMAs keep their factor now.
pub(crate) fn keep_factors(cubin: &mut [u8], turn: usize) -> usize {
    text_sections(cubin).into_iter().map(|section| keep_in(&mut cubin[section], turn)).sum()
}

fn keep_in(code: &mut [u8], turn: usize) -> usize {
    let word = |code: &[u8], at: usize| u64::from_le_bytes(code[at..at + 8].try_into().expect("eight bytes"));
    let is_ffma = |first: u64| first & 0xfff == FFMA;
    let [to, factor] = [16, 32].map(|shift| move |first: u64| first >> shift & 0xff);
    let (mut run, mut kept) = (0, 0);
    for at in (0..code.len()).step_by(16) {
        let first = word(code, at);
        run = if is_ffma(first) { run + 1 } else { 0 };
        if run == 0 {
            continue;
        }
        let next = if at + 16 < code.len() { word(code, at + 16) } else { 0 };
        let keep = run % turn != 0 && is_ffma(next) && factor(next) == factor(first) && to(first) != factor(first);
        let bits = word(code, at + 8) & !(NO_TURN | KEEP_FACTOR) | if keep { NO_TURN | KEEP_FACTOR } else { 0 };
        code[at + 8..at + 16].copy_from_slice(&bits.to_le_bytes());
        kept += usize::from(keep);
    }
    kept
}

/// Where the code lies in an ELF file of 64 bits.
fn text_sections(elf: &[u8]) -> Vec<std::ops::Range<usize>> {
    let number = |at: usize, bytes: usize| elf[at..at + bytes].iter().rev().fold(0, |n, &byte| n << 8 | usize::from(byte));
    let (headers, count, names) = (number(40, 8), number(60, 2), number(62, 2));
    let header = |index: usize| headers + 64 * index;
    let names = number(header(names) + 24, 8);
    let is_text = |index: &usize| elf[names + number(header(*index), 4)..].starts_with(b".text");
    let range = |index: usize| number(header(index) + 24, 8)..number(header(index) + 24, 8) + number(header(index) + 32, 8);
    (0..count).filter(is_text).map(range).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_keeps_its_factor_and_gives_turns() {
        let ffma = |to: u64, factor: u64| [FFMA | to << 16 | factor << 32, 0];
        let other = [0x221, KEEP_FACTOR];
        // Four of one factor, one of another, one that writes its factor, and what is no FFMA.
        let code = [ffma(1, 9), ffma(2, 9), ffma(3, 9), ffma(4, 9), ffma(5, 8), ffma(7, 7), ffma(6, 7), other];
        let mut bytes: Vec<u8> = code.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(keep_in(&mut bytes, 3), 2);
        let kept: Vec<bool> = bytes.chunks(16).map(|i| i[15] & 8 != 0).collect();
        assert_eq!(kept, [true, true, false, false, false, false, false, true]);
        let turns: Vec<bool> = bytes.chunks(16).map(|i| i[13] & 0x20 == 0).collect();
        assert_eq!(turns, [false, false, true, true, true, true, true, true]);
    }
}
