//! Counts and places of routed rows, and the rows packed by them, are the CPU's on a GPU. Without a GPU the tests say that they
//! were skipped.
use kernels::fp8::ScaleRule;
use kernels::ops::{quantise, routes};
use support::{gpu, poison, same};
use tch::{Device, Kind, Tensor};

#[allow(dead_code)] // the other tests use the rest
mod support;

#[test]
fn routed_rows_have_the_places_that_they_have_on_the_cpu() {
    let Some(gpu) = gpu("routed_rows_have_the_places_that_they_have_on_the_cpu") else {
        return;
    };
    for (rows, k, experts, ranks, per_node) in [(1i64, 1i64, 2i64, 2i64, 1i64), (0, 4, 8, 2, 2), (999, 3, 12, 4, 2), (4096, 8, 256, 64, 8), (5000, 6, 64, 8, 8)] {
        let name = format!("{rows} rows of {k}, {experts} experts on {ranks} ranks");
        let options = (Kind::Float, gpu.device());
        // Distinct experts of each row.
        let routes = Tensor::rand([rows, experts], options).argsort(1, false).narrow(1, 0, k).contiguous();
        let on_cpu = routes.to_device(Device::Cpu);
        let share = experts / ranks;
        poison(gpu);
        let counts = routes::count(&routes, experts, ranks, ranks / per_node);
        assert!(same(&counts, &routes::count(&on_cpu, experts, ranks, ranks / per_node)), "{name}: counts");
        let sent = counts.narrow(0, experts, ranks).sum(Kind::Int64).int64_value(&[]);
        // Some choices are elsewhere.
        let slots = |routes: &Tensor| routes.masked_fill(&(routes * 7).remainder(5).eq(0), -1).to_kind(Kind::Int);
        for (what, slots, sent) in [("all", routes.to_kind(Kind::Int), sent), ("some", slots(&routes), -1)] {
            let on_cpu = slots.to_device(Device::Cpu);
            let holds = |rank: i64| on_cpu.ge(rank * share).logical_and(&on_cpu.lt((rank + 1) * share));
            let goes = |rank: i64| if rows == 0 { 0 } else { holds(rank).any_dim(1, false).sum(Kind::Int64).int64_value(&[]) };
            let real: i64 = (0..ranks).map(goes).sum();
            assert!(sent < 0 || sent == real, "{name}: {sent} rows, not {real}");
            poison(gpu);
            // With room for more than there are.
            let got = routes::places(&slots, share, ranks, rows * k.min(ranks)).cut(real);
            let want = routes::places(&on_cpu, share, ranks, real);
            let local = on_cpu.lt(share).logical_and(&on_cpu.ge(0)).sum(Kind::Int64).int64_value(&[]);
            let cut = slots.masked_fill(&slots.ge(share), -1);
            let weights = Tensor::rand([rows, k], options);
            let (got_local, got_weights) = routes::local(&cut, &weights, share, local);
            let (want_local, want_weights) = routes::local(&cut.to_device(Device::Cpu), &weights.to_device(Device::Cpu), share, local);
            for (part, got, want) in [
                ("source", &got.source, &want.source),
                ("slots", &got.slots, &want.slots),
                ("sent rows", &got.sent_row, &want.sent_row),
                ("local rows' weights", &got_weights, &want_weights),
                ("local rows", &got_local.row, &want_local.row),
                ("local places", &got_local.place, &want_local.place),
                ("local counts", &got_local.counts, &want_local.counts),
            ] {
                assert!(same(got, want), "{name}, {what}: {part}");
            }
        }
    }
}

#[test]
fn rows_are_packed_by_destination_as_they_are_on_the_cpu() {
    let Some(gpu) = gpu("rows_are_packed_by_destination_as_they_are_on_the_cpu") else {
        return;
    };
    for (rows, width, k, experts, ranks) in [(1i64, 16i64, 1i64, 2i64, 2i64), (0, 128, 4, 8, 2), (77, 144, 3, 12, 4), (4096, 7168, 8, 32, 2), (500, 1536, 8, 256, 64)] {
        let name = format!("{rows} rows of {width} to {ranks} ranks");
        let options = (Kind::Float, gpu.device());
        let slots = Tensor::rand([rows, experts], options).argsort(1, false).narrow(1, 0, k).to_kind(Kind::Int);
        let slots = slots.masked_fill(&(&slots * 7).remainder(5).eq(0), -1);
        let (room, on_cpu) = (rows * k.min(ranks), slots.to_device(Device::Cpu));
        let places = routes::places(&slots, experts / ranks, ranks, room);
        let sent = places.sent_row.ge(0).sum(Kind::Int64).int64_value(&[]);
        // Tiles of nothing but zeros, too.
        let x = (Tensor::randn([rows, width], options) * Tensor::randint(3, [rows, 1], options)).to_kind(Kind::BFloat16);
        poison(gpu);
        let (values, scales) = quantise::pack(&x, &places.sent_row, room);
        let first = |t: &Tensor| t.view_dtype(if t.kind() == Kind::Float { Kind::Int } else { Kind::Uint8 }).narrow(0, 0, sent).to_device(Device::Cpu);
        let want = routes::places(&on_cpu, experts / ranks, ranks, sent);
        let (want_values, want_scales) = quantise::pack(&x.to_device(Device::Cpu), &want.sent_row, sent);
        assert!(first(&scales).equal(&first(&want_scales)), "{name}: scales");
        assert!(first(&values).equal(&first(&want_values)), "{name}: values");
        // What it replaces: quantised, then gathered.
        let all = quantise::rows(&x.to_device(Device::Cpu), ScaleRule::PowerOfTwo);
        assert!(first(&want_values).equal(&all.values.view_dtype(Kind::Uint8).index_select(0, &want.source)), "{name}: the reference");
    }
}
