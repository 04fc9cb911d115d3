//! The text of one matrix instruction: its operand count follows from the tile's width, so it is generated.

/// CUDA text of `wgmma(acc, a, b, add)`: acc[64 × n] (+)= a[64 × 32] · b[n × 32]ᵀ, E4M3 from shared memory into FP32.
pub fn text(n: usize) -> String {
    assert!(n.is_multiple_of(8) && (8..=256).contains(&n), "no matrix instruction is {n} wide");
    let num_regs = n / 2;
    let registers: Vec<String> = (0..num_regs).map(|i| format!("%{i}")).collect();
    let operands: Vec<String> = (0..num_regs).map(|i| format!("\"+f\"(d[{i}])")).collect();
    format!(
        "static __device__ __forceinline__ void wgmma(float (&d)[{num_regs}], u64 a, u64 b, int add) {{\n  \
         asm volatile(\"{{\\n.reg .pred p;\\nsetp.ne.b32 p, %{add}, 0;\\n\"\n    \
         \"wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{registers}}}, %{a}, %{b}, p, 1, 1;\\n}}\"\n    \
         : {operands} : \"l\"(a), \"l\"(b), \"r\"(add));\n}}\n",
        add = num_regs + 2,
        a = num_regs,
        b = num_regs + 1,
        registers = registers.join(", "),
        operands = operands.join(", "),
    )
}
