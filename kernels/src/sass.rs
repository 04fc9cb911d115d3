//! What the assembler leaves undone in Hopper's machine code: how long a multiplication keeps an operand.
//!
//! The FP8 GEMMs add up accumulators with long runs of FFMA that share a factor; Wgrad scales them before, in pairs of FMUL
//! that do. Three registers from two banks are one too many: kept from one instruction to the next, the factor needs no read,
//! and the banks are free for the matrix unit, which reads and writes accumulators there at the same time. The assembler
//! gives other warps a turn after every second FFMA, and a turn loses what was kept. Here a run keeps its factor, with a turn
//! every so often. The sums are the same bits.

/// The definition by which a source asks for it; its value is the number of instructions from one turn to the next.
pub(crate) const KEEP_FACTORS: &str = "KEEP_FACTORS";

/// An instruction has 16 bytes, its second word the bits of when it issues.
const FFMA: u64 = 0x223;
const FMUL: u64 = 0x220;
const NO_TURN: u64 = 1 << 45;
/// The register that is always zero.
const NONE: u64 = 0xff;
/// Where a factor is named in the first word, and the bit of the second that keeps it.
const FACTORS: [(u32, u64); 2] = [(24, 1 << 58), (32, 1 << 59)];

/// Changes the code of a cubin; how many multiplications keep a factor now.
pub(crate) fn keep_factors(cubin: &mut [u8], turn: usize) -> usize {
    text_sections(cubin).into_iter().map(|section| keep_in(&mut cubin[section], turn)).sum()
}

fn keep_in(code: &mut [u8], turn: usize) -> usize {
    let word = |code: &[u8], at: usize| u64::from_le_bytes(code[at..at + 8].try_into().expect("eight bytes"));
    let multiplies = |first: u64| matches!(first & 0xfff, FFMA | FMUL);
    let register = |first: u64, shift: u32| first >> shift & 0xff;
    let (mut run, mut kept) = (0, 0);
    for at in (0..code.len()).step_by(16) {
        let first = word(code, at);
        run = if multiplies(first) { run + 1 } else { 0 };
        if run == 0 {
            continue;
        }
        let next = if at + 16 < code.len() { word(code, at + 16) } else { 0 };
        let again = |&(shift, _): &(u32, u64)| {
            let factor = register(first, shift);
            multiplies(next) && register(next, shift) == factor && register(first, 16) != factor && factor != NONE
        };
        let keep: u64 = FACTORS.iter().filter(|factor| run % turn != 0 && again(factor)).map(|(_, bit)| bit).sum();
        if keep == 0 && first & 0xfff == FMUL {
            continue;
        }
        let all: u64 = FACTORS.iter().map(|(_, bit)| bit).sum();
        let bits = word(code, at + 8) & !(NO_TURN | all) | if keep > 0 { NO_TURN | keep } else { 0 };
        code[at + 8..at + 16].copy_from_slice(&bits.to_le_bytes());
        kept += usize::from(keep > 0);
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

    /// Kept factors of the last byte, of each instruction, and whether it gives a turn.
    fn keep(code: &[[u64; 2]], turn: usize) -> (Vec<u8>, Vec<bool>) {
        let mut bytes: Vec<u8> = code.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
        let num_kept = keep_in(&mut bytes, turn);
        let kept: Vec<u8> = bytes.chunks(16).map(|i| i[15] >> 2 & 3).collect();
        let turns: Vec<bool> = bytes.chunks(16).map(|i| i[13] & 0x20 == 0).collect();
        assert_eq!(num_kept, turns.iter().filter(|turn| !**turn).count());
        (kept, turns)
    }
    fn with(op: u64, to: u64, a: u64, b: u64) -> [u64; 2] {
        [op | to << 16 | a << 24 | b << 32, 0]
    }

    #[test]
    fn a_run_keeps_its_factor_and_gives_turns() {
        // Four of one factor, one of another, one that writes its factor, and what multiplies nothing.
        let runs = [(1, 9), (2, 9), (3, 9), (4, 9), (5, 8), (7, 7), (6, 7)].map(|(to, factor)| with(FFMA, to, to + 20, factor));
        let (kept, turns) = keep(&[&runs[..], &[[0x221, 1 << 59]]].concat(), 3);
        assert_eq!(kept, [2, 2, 0, 0, 0, 0, 0, 2]);
        assert_eq!(turns, [false, false, true, true, true, true, true, true]);
    }

    #[test]
    fn either_factor_is_kept_from_a_product_to_a_sum() {
        let code = [with(FMUL, 1, 9, 30), with(FMUL, 2, 9, 31), with(FFMA, 3, 40, 31), with(FFMA, 4, 0xff, 32), with(FMUL, 5, 0xff, 33)];
        let (kept, turns) = keep(&code, 8);
        assert_eq!(kept, [1, 2, 0, 0, 0]);
        assert_eq!(turns, [false, false, true, true, true]);
    }
}
