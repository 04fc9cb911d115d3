//! The text of BF16 matrix instructions, whose operand counts follow from the width.

/// Where an instruction's left side comes from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// Shared memory, contiguous along the contraction.
    Rows,
    /// Shared memory, contiguous along the output's rows.
    Columns,
    /// Four registers, as an output of 16 columns leaves them.
    Registers,
}

/// CUDA text of `name(d, a…, b)`: d[64 × n] = or, where it `adds`, += a[64 × 16] · b, BF16 into FP32. b lies in shared memory,
/// contiguous along the contraction, or `across`, along n.
pub fn text(name: &str, n: usize, left: Left, across: bool, adds: bool) -> String {
    assert!(n.is_multiple_of(8) && (8..=256).contains(&n), "no matrix instruction is {n} wide");
    let num = n / 2;
    let list = |of: std::ops::Range<usize>| of.map(|i| format!("%{i}")).collect::<Vec<_>>().join(", ");
    let constraint = if adds { "+f" } else { "=f" };
    let sums = (0..num).map(|i| format!("\"{constraint}\"(d[{i}])")).collect::<Vec<_>>().join(", ");
    let (across, adds) = (u8::from(across), u8::from(adds));
    let (parameters, inputs, a, b, ways) = match left {
        Left::Registers => {
            let inputs = "\"r\"(a0), \"r\"(a1), \"r\"(a2), \"r\"(a3), \"l\"(b)";
            ("u32 a0, u32 a1, u32 a2, u32 a3, u64 b", inputs, format!("{{{}}}", list(num..num + 4)), num + 4, format!("{across}"))
        }
        _ => ("u64 a, u64 b", "\"l\"(a), \"l\"(b)", format!("%{num}"), num + 1, format!("{}, {across}", u8::from(left == Left::Columns))),
    };
    format!(
        "static __device__ __forceinline__ void {name}(float (&d)[{num}], {parameters}) {{\n  \
         asm volatile(\"{{\\n.reg .pred p;\\nsetp.ne.b32 p, {adds}, 0;\\n\"\n    \
         \"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {{{sum}}}, {a}, %{b}, p, 1, 1, {ways};\\n}}\"\n    \
         : {sums} : {inputs});\n}}\n",
        sum = list(0..num),
    )
}
