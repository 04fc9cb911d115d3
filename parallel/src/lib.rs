//! Groups of ranks and what they exchange: mesh, communicators, MoE dispatch, pipeline schedules, ZeRO-1.
//! Knows nothing of layers (invariant 1 of ARCHITECTURE.md).
pub mod comm;
pub mod mesh;
pub mod dispatch;
pub mod schedule;
