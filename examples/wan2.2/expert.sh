# Which of the two experts of a Wan2.2 A14B model a script trains; sourced, not run by itself.
EXPERT=${EXPERT:-high}   # high learns noise levels from the boundary on, low those below it
case "$EXPERT" in
    high) transformer=transformer ;;   # their folders in diffusers' layout
    low) transformer=transformer_2 ;;
    *) echo "error ENV-007: EXPERT is $EXPERT. Fix: use high or low." >&2; exit 64 ;;
esac
MM_MODEL=${MM_MODEL:-$here/pretrain_model_$EXPERT.json}
